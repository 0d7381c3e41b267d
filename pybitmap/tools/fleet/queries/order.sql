-- SPDX-License-Identifier: MIT
-- In which order to copy, so that as many disks as can be are done within the window.
-- On each link one disk after the other, the smallest first, at the link's bandwidth; begins and ends are seconds from the
-- begin of the window. Increments come before full copies, which can be left for another night; last are disks of which it
-- is not known how much is to be copied, without times.
-- bandwidth: bytes a second of links that are not named; window: seconds of the night.
WITH sent AS (
    SELECT link, own, host, disk, job, nbytes, bandwidth,
        CASE WHEN nbytes IS NOT NULL THEN sum(nbytes) OVER (
            PARTITION BY link, own
            ORDER BY nbytes IS NULL, job = 'full', nbytes, host, disk ROWS UNBOUNDED PRECEDING
        ) END AS until
    FROM jobs JOIN paths USING (host)
)
SELECT link, host, disk, job, nbytes,
    round((until - nbytes) / bandwidth, 1) AS begins,
    round(until / bandwidth, 1) AS ends,
    until / bandwidth <= coalesce(getvariable('window')::DOUBLE, 28800) AS fits
FROM sent
ORDER BY link, own, until NULLS LAST, job, host, disk;
