"""Whether this process is a job that `ray job submit` started, and its id."""

import json
import os

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the jobs that it runs


def is_submitted() -> bool:
    return JOB_CONFIG in os.environ


def submission_id() -> str | None:
    """Return the id that `ray job list` shows for this job, or None where it was not submitted."""
    config = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    return (config.get("metadata") or {}).get("job_submission_id")
