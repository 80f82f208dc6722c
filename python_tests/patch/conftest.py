"""Applies to every test of this folder."""

from host_models import one_thread  # noqa: F401
