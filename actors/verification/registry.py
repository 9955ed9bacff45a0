"""Verification rules by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from actors.sampling.params import ParameterError
from actors.verification.coupled import CoupledRule
from actors.verification.leviathan import LeviathanRule
from actors.verification.rule import VerificationRule

RULES: Mapping[str, VerificationRule] = MappingProxyType(
    {rule.name: rule for rule in (CoupledRule(), LeviathanRule())}
)
"""Rules are stateless, so one instance of each serves everybody."""


def get_rule(name: str) -> VerificationRule:
    """The rule called `name`. Raises `ParameterError` when there is none."""
    try:
        return RULES[name]
    except KeyError:
        raise ParameterError(
            "speculation.verification", f"must be one of {', '.join(sorted(RULES))}, not {name!r}"
        ) from None
