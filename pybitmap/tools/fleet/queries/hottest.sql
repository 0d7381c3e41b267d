-- SPDX-License-Identifier: MIT
-- The regions with the largest share that is dirty.
-- Regions that are wholly dirty, one behind the other, are one row: a full disk is one, however large. A disk's last region
-- may end behind the disk.
-- region: bytes of one, 1 GiB if it is not set; rows: how many are shown, 20 if it is not set.
WITH settings AS (
    SELECT coalesce(getvariable('region')::BIGINT, 1073741824) AS region
), cut AS (
    -- of each extent: the regions in which it begins and ends, and those that it covers: from one, up to another
    SELECT host, disk, bitmap, epoch, region, "offset" AS begin, "offset" + length AS "end",
        begin // region AS first, "end" // region AS upto, first + (begin % region > 0)::BIGINT AS whole
    FROM extents, settings
), parts AS (
    SELECT host, disk, bitmap, epoch, region, first AS place, least("end" - begin, region - begin % region) AS dirty
    FROM cut WHERE first < whole
    UNION ALL
    SELECT host, disk, bitmap, epoch, region, upto, "end" % region
    FROM cut WHERE "end" % region > 0 AND upto >= whole
), found AS (
    SELECT host, disk, bitmap, epoch, place * any_value(region) AS "offset", any_value(region) AS length, sum(dirty) AS dirty_bytes
    FROM parts GROUP BY host, disk, bitmap, epoch, place
    UNION ALL
    SELECT host, disk, bitmap, epoch, whole * region, (upto - whole) * region, (upto - whole) * region
    FROM cut WHERE upto > whole
)
SELECT host, disk, bitmap, "offset", length, dirty_bytes, round(dirty_bytes / length, 3) AS share
FROM found
ORDER BY dirty_bytes / length DESC, length DESC, host, disk, bitmap, "offset"
LIMIT (SELECT coalesce(getvariable('rows')::BIGINT, 20));
