"""Evaluation in simulated environments; needs the extra ``sim``."""

from robopolicy.errors import require_extra

require_extra("gymnasium", "sim")
