-- SPDX-License-Identifier: MIT
-- What tonight's jobs copy: bytes for each link and host, and how long that takes.
-- Hosts of a link share its bandwidth. full_bytes are at most so many: the whole size, holes too. unknown are disks of
-- which it is not known how much is to be copied.
-- bandwidth: bytes a second of links that are not named; window: seconds of the night.
SELECT link, host,
    count(*) FILTER (job = 'increment') AS increments,
    count(*) FILTER (job = 'full' AND nbytes IS NOT NULL) AS fulls,
    count(*) FILTER (nbytes IS NULL) AS unknown,
    coalesce(sum(nbytes) FILTER (job = 'increment'), 0) AS increment_bytes,
    coalesce(sum(nbytes) FILTER (job = 'full'), 0) AS full_bytes,
    round(coalesce(sum(nbytes), 0) / any_value(bandwidth), 1) AS seconds,
    round(sum(coalesce(sum(nbytes), 0)) OVER (PARTITION BY link, own) / any_value(bandwidth)
        / coalesce(getvariable('window')::DOUBLE, 28800), 3) AS link_share_of_window
FROM jobs JOIN paths USING (host)
GROUP BY link, own, host
ORDER BY link, own, host;
