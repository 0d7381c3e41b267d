# SPDX-License-Identifier: MIT
"""How much Hypothesis tries: by default little, more with HYPOTHESIS_PROFILE=ci or =long."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline: no test here is about how long something takes.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "ci",
    settings.get_profile("default"),
    max_examples=150,
    stateful_step_count=50,
    print_blob=True,
)
settings.register_profile("long", settings.get_profile("ci"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
