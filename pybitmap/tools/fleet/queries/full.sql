-- SPDX-License-Identifier: MIT
-- Which disks need a full copy, or could not be looked at, and why.
-- longest_chain: files of a chain from which on a full copy begins a new one, 30 if it is not set; full_share: of its size
-- that is dirty (0 to 1) from which on a full copy is as well, 1 if it is not set.
SELECT host, disk, job, state, bitmap, chain_length, size, why
FROM jobs
WHERE job <> 'increment'
ORDER BY job, why, host, disk;
