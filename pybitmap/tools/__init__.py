# SPDX-License-Identifier: MIT
"""What commands do to machines that run, and with their disks; for programs of one's own, too."""
