-- SPDX-License-Identifier: MIT
-- How long the chains have become: files that a restore of each disk reads, the longest first.
SELECT chain_length, count(*) AS disks, sum(size) AS size, any_value(disk) AS example
FROM (SELECT DISTINCT host, disk, size, chain_length FROM disks WHERE chain_length IS NOT NULL)
GROUP BY chain_length
ORDER BY chain_length DESC;
