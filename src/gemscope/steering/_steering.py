"""Several changes as the edits of one pass: one sum of deltas for each site written."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.lm import Edit, LanguageModel, Tokens
from gemscope.sae import SAE
from gemscope.sites import Site

from ._change import Change
from ._modes import READS_ACTIVATION, Mode, Unit
from ._parts import Feature

_TINY = 1e-30


class Steering:
    """Changes of features and directions, at any number of sites, as one value for `lm`.

    At each site every activation and projection is taken from what the site holds before any
    change; deltas are summed in float32 and added once, so that their order does not matter.
    Tokens whose delta is zero keep their bits. Strengths that are one for each row need a batch of
    as many rows.
    """

    def __init__(self, changes: Iterable[Change]):
        self.changes = tuple(changes)
        by_site: dict[Site, list[Change]] = {}
        for change in self.changes:
            for site in change.what.rows:
                by_site.setdefault(site, []).append(change)
        # Sums of floats depend on their order: always the same one, however they were given.
        self._sites = {site: tuple(sorted(by_site[site], key=_name)) for site in sorted(by_site)}
        for site, own in self._sites.items():
            if len({change.keep_norm for change in own}) > 1:
                raise InputError(
                    f"of the changes at {site} some keep the length of what is there and some do "
                    "not; ask it of all or of none"
                )
        self._check_replaced()
        many = {len(c.strength.values) for c in self.changes if c.strength} - {1}
        if len(many) > 1:
            raise InputError(f"strengths for {sorted(many)} rows cannot be of one batch")
        self._rows = next(iter(many), None)
        self._on: dict[torch.device, dict[Site, tuple[Change, ...]]] = {}

    def _check_replaced(self) -> None:
        """A site is replaced by one dictionary, at the same tokens for all of its features."""
        where: dict[Site, tuple] = {}
        for c in self.changes:
            if c.mode is not Mode.REPLACE:
                continue
            sae = cast(SAE, cast(Feature, c.what).sae)
            # Features loaded one by one bring a dictionary each, of the same address.
            how = (sae.origin.address or id(sae), c.positions, c.schedule, c.amount)
            first = where.setdefault(sae.writes, how)
            if first[0] != how[0]:
                raise InputError(
                    f"{c.what.name} and a feature of another dictionary both replace what is at "
                    f"{sae.writes}; replace by one of them"
                )
            if first != how:
                raise InputError(
                    f"{c.what.name} and another feature of its dictionary are replaced at "
                    "different tokens; give them the same positions, schedule and amount"
                )

    def check(self, model: LanguageModel, *, other_model: bool = False) -> None:
        """Refuse features of another model's dictionaries, and strengths that overflow `model`.

        With `other_model`, a dictionary of another model is taken on purpose: widths must fit.
        """
        for change in self.changes:
            if isinstance(change.what, Feature):
                (model.check_widths if other_model else model.check)(change.what.sae)
            for site, row in change.what.rows.items():
                if len(row) != (wanted := model.width(site)):
                    raise InputError(
                        f"{change.what.name} has {len(row)} numbers at {site}, where "
                        f"{model.name or 'the model'} has {wanted}: it is another model's"
                    )
            # Norms square what they are given, in float32.
            limit = min(torch.finfo(model.dtype).max, math.sqrt(torch.finfo(torch.float32).max))
            for size in change.largest():
                if size >= limit / model.width(next(iter(change.what.rows))):
                    name = str(model.dtype).removeprefix("torch.")
                    raise InputError(
                        f"a strength of {change.strength} on {change.what.name} overflows {name}; "
                        "give a smaller one, or load the model in a wider type"
                    )

    def steps(self) -> tuple[Edit, ...]:
        """One edit for each site; what a row's prompt says of maxima lasts for the pass."""
        return tuple(self._edit(site, changes) for site, changes in self._sites.items())

    def _edit(self, site: Site, changes: Sequence[Change]) -> Edit:
        reads = (site, *sorted({s for c in changes for s in _reads(c, site)} - {site}))
        peaks: dict[int, Tensor] = {}

        def function(tokens: Tokens, *xs: Tensor) -> Tensor:
            at = dict(zip(reads, xs, strict=True))
            here = self._there(xs[0].device)[site]
            return self._written(site, here, tokens, at, peaks)

        return Edit(reads, site, function, placed=True)

    def _there(self, device: torch.device) -> dict[Site, tuple[Change, ...]]:
        """The changes with their vectors on a device, moved once."""
        if device not in self._on:
            moved = {id(c): _moved(c, device) for c in self.changes}
            self._on[device] = {
                site: tuple(moved[id(c)] for c in own) for site, own in self._sites.items()
            }
        return self._on[device]

    def _written(
        self,
        site: Site,
        changes: Sequence[Change],
        tokens: Tokens,
        at: dict[Site, Tensor],
        peaks: dict[int, Tensor],
    ) -> Tensor:
        """What `site` holds after the changes, in its own type."""
        n_rows = len(tokens.prompt_lengths)
        if self._rows not in (None, n_rows):
            raise InputError(f"strengths for {self._rows} rows in a batch of {n_rows}")
        x = at[site]
        seen = _Seen(x.float(), at, tokens, peaks)
        coefficients, rows, whole = [], [], None
        for place, change in enumerate(changes):
            coefficient, row = seen.moved(change, site, place)
            coefficients.append(_made(change, coefficient, tokens))
            rows.append(row)
            if change.mode is Mode.REPLACE and whole is None:
                # All that replace are of one dictionary and share its reconstruction.
                error = seen.without_error(cast(SAE, cast(Feature, change.what).sae))
                share = _made(change, 1.0, tokens)
                whole = torch.where(share[:, None] != 0, share[:, None] * error, 0.0)
        if len(rows) == 1:
            active = coefficients[0] != 0
            delta = coefficients[0][:, None] * rows[0]
        else:
            many = torch.stack(coefficients, dim=1)
            active, delta = (many != 0).any(1), many @ torch.stack(rows)
        if whole is not None:
            active, delta = active | (whole != 0).any(1), delta + whole
        # What is not added stays as exact as it was: a float64 stream is not rounded.
        new = x.to(torch.promote_types(x.dtype, torch.float32)) + delta
        if changes[0].keep_norm:
            new = new * (_length(seen.x) / _length(new).clamp_min(_TINY))
        return torch.where(active[:, None], new.to(x.dtype), x)


def _made(change: Change, coefficient: Tensor | float, tokens: Tokens) -> Tensor:
    """How much of a change is made at each token, float32 `[n_tokens]`."""
    mask = change.positions.mask(tokens)
    factor = change.schedule.factors(tokens)
    share = factor if change.amount == 1 else factor * change.amount
    if isinstance(share, Tensor):
        # A change that is not made adds nothing, however large it would have been.
        mask = mask & (share != 0)
    elif share == 0:
        return torch.zeros(len(mask), device=mask.device)
    if not (isinstance(share, float) and share == 1):
        coefficient = coefficient * share
    made = torch.where(mask, coefficient, 0.0)
    return made if made.dtype == torch.float32 else made.float()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the changes of one site read: everything before any of them."""

    x: Float[Tensor, "n_tokens d"]
    at: dict[Site, Tensor]
    tokens: Tokens
    peaks: dict[int, Tensor]

    def moved(
        self, change: Change, site: Site, place: int
    ) -> tuple[Float[Tensor, " n_tokens"] | float, Float[Tensor, " d"]]:
        """How far one change moves each token along a vector, and the vector; positions aside."""
        row = change.what.rows[site]
        if change.mode in READS_ACTIVATION:
            feature = cast(Feature, change.what)
            f = feature.values(self.at[feature.reads])
            return self._coefficients(change, f, row, place), row
        if change.mode is Mode.ADD:
            return self._strength(change, row), row
        unit = row / _length(row[None])[0].clamp_min(_TINY)
        along = self.x @ unit
        match change.mode:
            case Mode.ABLATE_DIRECTION:
                return -along, unit
            case Mode.SCALE_DIRECTION:
                return (self._number(change) - 1) * along, unit
            case Mode.NORM_RELATIVE:
                return self._number(change) * _length(self.x)[:, 0], unit
            case _:
                wanted = self._number(change)
                if change.strength is not None and change.strength.unit is Unit.NORM:
                    wanted = wanted * _length(self.x)[:, 0]
                return wanted - along, unit

    def _coefficients(self, change: Change, f: Tensor, row: Tensor, place: int) -> Tensor:
        """By how much of its row each token's feature is moved."""
        if change.mode is Mode.ABLATE:
            return -f
        if change.mode is Mode.REPLACE and change.strength is None:
            return torch.zeros_like(f)
        if change.mode is Mode.MULTIPLY:
            return (self._number(change) - 1) * f
        if change.mode is Mode.MAX_RELATIVE:
            return self._number(change) * self._peak(f, place)
        s = self._strength(change, row)
        match change.mode:
            case Mode.OFFSET_IF_ACTIVE:
                return torch.where(f > 0, s, 0.0)
            case Mode.SET_IF_ACTIVE:
                return torch.where(f > 0, s - f, 0.0)
            case Mode.FLOOR:
                return (s - f).clamp_min(0)
            case Mode.CAP:
                return (s - f).clamp_max(0)
            case _:
                return s - f

    def _number(self, change: Change) -> Tensor | float:
        """The strength's number, at every token if rows have their own."""
        assert change.strength is not None
        values = change.strength.values
        if len(values) == 1:
            return values[0]
        return torch.tensor(values, device=self.x.device)[self.tokens.rows]

    def _strength(self, change: Change, row: Tensor) -> Tensor | float:
        """The strength in units of activation, at every token if they differ."""
        s = self._number(change)
        assert change.strength is not None
        match change.strength.unit:
            case Unit.MAX:
                return s * cast(float, cast(Feature, change.what).maximum)
            case Unit.NORM:
                return s * _length(self.x)[:, 0] / _length(row[None])[0].clamp_min(_TINY)
            case Unit.CURRENT:
                feature = cast(Feature, change.what)
                return s * feature.values(self.at[feature.reads])
            case _:
                return s

    def _peak(self, f: Tensor, place: int) -> Tensor:
        """The largest activation in the prompt of each token's row, special tokens left out."""
        n_rows = len(self.tokens.prompt_lengths)
        given = self.tokens.ordinary & (self.tokens.steps < 0)
        if bool(given.any()):
            found = torch.zeros(n_rows, device=f.device)
            found = found.scatter_reduce(0, self.tokens.rows[given], f[given], "amax")
            self.peaks[place] = torch.maximum(found, self.peaks.get(place, found))
        if place not in self.peaks:
            return torch.zeros_like(f)  # a prompt of special tokens only
        return self.peaks[place][self.tokens.rows]

    def without_error(self, sae: SAE) -> Float[Tensor, "n_tokens d"]:
        """What takes the reconstruction's error away: it, less what is there."""
        there = sae.w_enc.device
        return sae.reconstruct(self.at[sae.reads].to(there)).to(self.x.device) - self.x


def _reads(change: Change, site: Site) -> tuple[Site, ...]:
    """Sites whose values a change at `site` needs besides it."""
    if not isinstance(change.what, Feature):
        return ()
    current = change.strength is not None and change.strength.unit is Unit.CURRENT
    return (change.what.reads,) if change.mode in READS_ACTIVATION or current else ()


def _name(change: Change) -> tuple[str, ...]:
    return (change.what.name, str(change.mode), str(change.strength), str(change.positions))


def _moved(change: Change, device: torch.device) -> Change:
    from dataclasses import replace

    if isinstance(change.what, Feature):
        return replace(change, what=change.what.to(device))
    return replace(change, what=replace(change.what, vector=change.what.vector.to(device)))


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
