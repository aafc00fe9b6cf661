"""What the scans of a set are, taken together: who is taken for CT, and who differs from the others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mim3d.core.errors import DataError, listed
from mim3d.core.names import number_of
from mim3d.core.progress import counted
from mim3d.datasets.cases import Case, CaseSet
from mim3d.scans.modality import ChannelModality, decide, is_ct_set, modality_name, modality_of_channels, sign_of
from mim3d.scans.volumes import modality_of, read_volume

#: Kinds of scans that are not what their set or a declaration says.
_NOT_IN_HU, _LIKE_CT = "CT not in HU", "like CT"

#: Scans whose voxels are looked at before a set is worked on.
NUM_SAMPLED = 16

#: Case id -> what each of its channels is.
Modalities = Mapping[str, Sequence[ChannelModality]]


@dataclass(frozen=True, kw_only=True)
class SetRemark:
    """What is said of a set once, and changes how what comes of it is to be read.

    Attributes:
        text: The sentence.
        refused: Whether ``strict`` refuses such a set.
    """

    text: str
    refused: bool


def in_hu(modalities: Sequence[ChannelModality]) -> list[bool]:
    """Whether each channel of a scan is taken for HU."""
    return [channel.in_hu for channel in modalities]


def settled(cases: Sequence[Case], found: Modalities) -> dict[str, tuple[ChannelModality, ...]]:
    """What each scan of a set is, once all are known.

    A scan that nothing is known of is CT where most of the others are.

    Args:
        cases: The cases with what is declared of them.
        found: What is known of each by itself; cases that are missing could not be used.
    """
    known: dict[str, list[ChannelModality]] = {}
    for case in cases:
        if case.id in found:
            declared = modality_of_channels(case.modality, len(found[case.id]))
            known[case.id] = [
                channel if channel.by == "earlier version" and name is None else _by_itself(channel, name)
                for channel, name in zip(found[case.id], declared, strict=True)
            ]
    of_set = set_in_hu(known)
    return {
        name: tuple(
            decide(channel.sign, set_in_hu=is_ct) if channel.by == "nobody" else channel
            for channel, is_ct in zip(channels, of_set, strict=False)
        )
        for name, channels in known.items()
    }


def set_in_hu(modalities: Modalities) -> tuple[bool, ...]:
    """For each channel of a set whether it is CT in most of those scans that are known by themselves."""
    return tuple(is_ct_set(channels) for channels in _by_channel(modalities))


def _by_itself(channel: ChannelModality, declared: str | None) -> ChannelModality:
    return decide(channel.sign, declared=declared, header=channel.name if channel.by == "header" else None)


def _by_channel(modalities: Modalities) -> list[list[ChannelModality]]:
    """The scans' modalities for each channel; none where scans have different numbers of channels."""
    numbers = {len(channels) for channels in modalities.values()}
    if len(numbers) != 1:
        return [[] for _ in range(max(numbers, default=0))]
    return [list(channels) for channels in zip(*modalities.values(), strict=True)]


def remarks_on(modalities: Modalities, minima: Mapping[str, Sequence[float]]) -> tuple[SetRemark, ...]:
    """What is to be said of a set: what was guessed, and which scans differ from the others.

    Args:
        modalities: What each scan is, see :func:`settled`.
        minima: Case id -> darkest voxel of each channel.
    """
    remarks = []
    by_channel = _by_channel(modalities)
    for place, channels in enumerate(by_channel):
        of_scan = dict(zip(modalities, channels, strict=False))
        where = f" in channel {place}" if len(by_channel) > 1 else ""
        followers = [name for name, channel in of_scan.items() if channel.by == "set"]
        if followers:
            text = (
                f"{number_of(len(followers), 'scan', 'show', of=len(of_scan))} no air to tell CT by{where}; CT is "
                f"assumed, like the others: {listed(followers)}."
            )
            remarks.append(SetRemark(text=text, refused=False))
        doubtful = [name for name, channel in of_scan.items() if channel.is_unlike_ct]
        if doubtful:
            text = (
                f"{number_of(len(doubtful), 'scan', 'show', of=len(of_scan))} neither air nor tissue as a CT in HU has"
                f"{where}, though declared as CT: {listed(doubtful)} (darkest voxel {minima[doubtful[0]][place]:g}). "
                "HU are assumed as declared; correct what is declared where it is wrong."
            )
            # A whole set may hold crops of bones or what lies within a mask; few of many are likely an error.
            remarks.append(SetRemark(text=text, refused=2 * len(doubtful) < len(of_scan)))
        kinds = _kinds(of_scan)
        is_odd = {_LIKE_CT, _NOT_IN_HU} & set(kinds.values())
        if len(set(kinds.values())) > 1 or is_odd:
            darkest = {name: minima[name][place] for name in of_scan}
            meant = not is_odd and all(channel.by == "declared" for channel in of_scan.values())
            remarks.append(SetRemark(text=_on_kinds(kinds, of_scan, darkest, where, meant), refused=not meant))
    return tuple(remarks)


def require_one_kind(cases: CaseSet) -> None:
    """Refuse a set before any work where some of its scans show already that it would be refused once all are known.

    Looked at are scans evenly spaced in the set, and one of each modality that is declared or said by a header.

    Args:
        cases: The data set; scans that cannot be read are passed over.

    Raises:
        DataError: The scans are of several kinds that nothing declares, or not what they are declared as.
    """
    step = -(-len(cases.cases) // NUM_SAMPLED)
    chosen = {case.id: case for case in cases.cases[::step]}
    seen = set()
    for case in cases.cases:
        said = case.modality, tuple(map(modality_of, case.images))
        if said not in seen:
            chosen.setdefault(case.id, case)
        seen.add(said)
    found, minima = {}, {}
    for case in counted(chosen.values(), len(chosen), "looking at"):
        try:
            channels = [read_volume(path).array for path in case.images]
        except DataError:
            continue
        found[case.id] = [
            decide(sign_of(channel), header=modality_of(path))
            for path, channel in zip(case.images, channels, strict=True)
        ]
        minima[case.id] = [float(channel.min()) for channel in channels]
    refused = [each.text for each in remarks_on(settled(tuple(chosen.values()), found), minima) if each.refused]
    if refused:
        raise DataError(
            f"{cases.root}: {' '.join(refused)} (strict: such a set is refused; "
            f"{number_of(len(found), 'scan', 'were', of=len(cases.cases))} looked at, and nothing was made)"
        )


def _kinds(of_scan: Mapping[str, ChannelModality]) -> dict[str, str]:
    """Case id -> what it is in words, the same for scans that belong together."""
    channels = list(of_scan.values())
    most_are_ct = is_ct_set(channels) or 2 * sum(each.sign == "HU + 1024" for each in channels) > len(channels)
    names = {name: channel.name or modality_name(name) for name, channel in of_scan.items()}
    # Names of files tell kinds apart only where all of them do.
    all_named = all(names.values())
    kinds = {}
    for name, channel in of_scan.items():
        if channel.in_hu:
            kinds[name] = "CT"
        elif channel.name == "CT" or (channel.sign == "HU + 1024" and channel.name is None and most_are_ct):
            kinds[name] = _NOT_IN_HU
        elif channel.is_like_ct:
            kinds[name] = _LIKE_CT
        else:
            named = names[name] if all_named else None
            kinds[name] = "not CT" if named in (None, "CT") else str(named)
    return kinds


def _on_kinds(
    kinds: Mapping[str, str],
    of_scan: Mapping[str, ChannelModality],
    darkest: Mapping[str, float],
    where: str,
    meant: bool,
) -> str:
    counts = Counter(kinds.values())
    usual = counts.most_common(1)[0][0]
    parts = []
    for kind, _ in counts.most_common():
        ids = [name for name, own in kinds.items() if own == kind]
        if kind == _NOT_IN_HU:
            ct = [darkest[name] for name, own in kinds.items() if own == "CT"]
            others = f" where the CT have {median(ct):g}" if ct else ""
            added = ", probably stored with 1024 added" if of_scan[ids[0]].sign == "HU + 1024" else ""
            parts.append(f"{listed(ids)} (darkest voxel {darkest[ids[0]]:g}{others}: not in HU{added})")
        elif kind == _LIKE_CT:
            said = " and ".join(sorted({str(of_scan[name].name) for name in ids}))
            parts.append(f"{listed(ids)} (declared as {said}, with air and tissue as a CT in HU has)")
        elif kind != usual:
            parts.append(f"{kind}: {listed(ids)}")
    found = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    remedy = "" if meant else " Correct them or leave them out; kinds that are meant are declared (modality)."
    different = " of different kinds" if len(counts) > 1 else ""
    return f"{number_of(len(of_scan), 'scan')}{different}{where}: {found}; {'; '.join(parts)}.{remedy}"
