"""The family of four: which factors a member keeps, and where its eigenvalues come from."""

from typing import NamedTuple


class Member(NamedTuple):
    """One optimizer of the family, defined by two switches."""

    name: str
    plain: bool  # factors A and U instead of the trace-restricted Φ and Ψ
    measured: bool  # Θ is measured in the eigenbasis instead of the factors' eigenvalues


KFAC = Member("KFAC", plain=True, measured=False)
EKFAC = Member("EKFAC", plain=True, measured=True)
TKFAC = Member("TKFAC", plain=False, measured=False)
TEKFAC = Member("TEKFAC", plain=False, measured=True)
_FAMILY = (KFAC, EKFAC, TKFAC, TEKFAC)


def member_of(plain: bool, measured: bool) -> Member:
    """The member with these two switches."""
    (member,) = (m for m in _FAMILY if (m.plain, m.measured) == (plain, measured))
    return member
