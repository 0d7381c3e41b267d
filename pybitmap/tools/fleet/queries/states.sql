-- SPDX-License-Identifier: MIT
-- How many bitmaps, disks and targets are in which state, with an example of each reason.
SELECT state, count(*) AS count, coalesce(sum(dirty_bytes), 0) AS dirty_bytes, min(disk) AS example,
    arg_min(reason, disk) AS reason
FROM disks
GROUP BY state
ORDER BY count DESC, state;
