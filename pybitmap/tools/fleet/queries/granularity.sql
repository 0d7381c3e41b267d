-- SPDX-License-Identifier: MIT
-- What increments would copy if bitmaps had coarser groups: 64 KiB to 16 MiB.
-- Extents of a bitmap are in order and do not touch, so a group that two of them share is counted with the first.
-- What is finer than a bitmap's own granularity is not known, and counts as that. size is that of all disks.
WITH job AS (
    SELECT host, disk, bitmap, epoch, size, granularity FROM jobs WHERE state = 'ready'
), ordered AS (
    SELECT size, "offset", "offset" + length AS "end",
        lag("offset" + length, 1, 0) OVER (PARTITION BY e.host, e.disk, e.bitmap, e.epoch ORDER BY "offset") AS before
    FROM extents e JOIN job USING (host, disk, bitmap, epoch)
)
SELECT g AS granularity,
    -- up to the end of a group, or of the disk; without a number that would be beyond 2^63
    coalesce(sum(
        "end" + least((g - "end" % g) % g, size - "end")
        - greatest("offset" - "offset" % g, before + least((g - before % g) % g, size - before))
    ), 0) AS nbytes,
    round(nbytes / nullif(sum("end" - "offset"), 0), 3) AS times_now,
    round(nbytes / (SELECT nullif(sum(size), 0) FROM job), 6) AS share_of_size
FROM unnest([65536, 131072, 262144, 524288, 1048576, 2097152, 4194304, 8388608, 16777216]) AS grains(g)
    LEFT JOIN ordered ON true
GROUP BY g
ORDER BY g;
