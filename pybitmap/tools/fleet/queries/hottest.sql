-- SPDX-License-Identifier: MIT
-- The regions with the most that is dirty.
-- region: bytes of one, 1 GiB if it is not set; rows: how many are shown, 20 if it is not set.
WITH settings AS (
    SELECT coalesce(getvariable('region')::BIGINT, 1073741824) AS region
), spread AS (
    SELECT host, disk, bitmap, epoch, "offset", length, region,
        unnest(range("offset" // region, ("offset" + length - 1) // region + 1)) AS place
    FROM extents, settings
)
SELECT host, disk, bitmap, place * region AS "offset", any_value(region) AS length,
    sum(least("offset" + length, (place + 1) * region) - greatest("offset", place * region))::BIGINT AS dirty_bytes,
    round(sum(least("offset" + length, (place + 1) * region) - greatest("offset", place * region)) / any_value(region), 3)
        AS share
FROM spread
GROUP BY host, disk, bitmap, epoch, place, region
ORDER BY dirty_bytes DESC, host, disk, bitmap, "offset"
LIMIT (SELECT coalesce(getvariable('rows')::BIGINT, 20));
