-- SPDX-License-Identifier: MIT
-- What the other queries build on; read before each of them.
--
-- There are the tables disks, extents and chains of a scan (what their columns mean: pybitmap/tools/fleet/tables.py)
-- and links (host, link, bandwidth in bytes a second; of hosts that no --links names there is no row).
-- Values that are set from outside (--set NAME=VALUE, --bandwidth, --window, --bitmap) are variables, which getvariable()
-- has; NULL where nobody has set them.

-- Each host, the link that it sends over (its own, where none is named; it may be called as one that is), and bytes a second.
CREATE VIEW paths AS
SELECT host, coalesce(l.link, host) AS link, l.link IS NULL AS own,
    coalesce(l.bandwidth, getvariable('bandwidth')::BIGINT, 125000000) AS bandwidth  -- 1 Gbit/s
FROM (SELECT DISTINCT host FROM disks) LEFT JOIN links l USING (host);

-- Of each disk the one bitmap that the next increment copies by: that with the name that was asked for; else the one that
-- a backup began; else, of those that record, the one with the most that is dirty: too much is copied, never too little.
CREATE VIEW chosen AS
SELECT * FROM disks
WHERE bitmap IS NULL OR bitmap = coalesce(getvariable('bitmap')::VARCHAR, bitmap)
QUALIFY row_number() OVER (
    PARTITION BY host, disk
    ORDER BY bitmap IS NULL AND getvariable('bitmap') IS NOT NULL, epoch <> '0' DESC, state = 'ready' AND recording DESC, dirty_bytes DESC NULLS LAST, bitmap
) = 1;

-- Of each disk, what tonight's job is: an increment, a full copy and why, or not known and why. nbytes is what it copies.
CREATE VIEW jobs AS
WITH judged AS (
    SELECT c.* REPLACE (coalesce(c.reason, c.state) AS reason),
        CASE
            WHEN c.state NOT IN ('ready', 'inconsistent', 'no bitmap') THEN 'unknown'
            WHEN c.state <> 'ready' THEN 'full'
            WHEN NOT c.recording AND getvariable('bitmap') IS NULL THEN 'full'
            WHEN c.chain_length >= coalesce(getvariable('longest_chain')::BIGINT, 30) THEN 'full'
            WHEN c.size > 0 AND c.dirty_bytes >= coalesce(getvariable('full_share')::DOUBLE, 1) * c.size THEN 'full'
            ELSE 'increment'
        END AS job
    FROM chosen c
)
SELECT host, disk, bitmap, epoch, size, granularity, dirty_bytes, chain_length, state, job,
    CASE job WHEN 'full' THEN size WHEN 'increment' THEN dirty_bytes END AS nbytes,
    CASE
        WHEN job = 'increment' THEN NULL
        WHEN state <> 'ready' THEN reason
        WHEN NOT recording AND getvariable('bitmap') IS NULL THEN 'its bitmap does not record'
        WHEN chain_length >= coalesce(getvariable('longest_chain')::BIGINT, 30)
            THEN 'its chain has ' || chain_length || ' files'
        ELSE 'nearly all of it is dirty, or all'
    END AS why
FROM judged
UNION ALL BY NAME
-- Disks of which no bitmap has the name that was asked for.
SELECT DISTINCT ON (host, disk) host, disk, size, 'no bitmap' AS state, 'full' AS job, size AS nbytes,
    'it has no bitmap ' || getvariable('bitmap') AS why
FROM disks WHERE (host, disk) NOT IN (SELECT (host, disk) FROM chosen);
