"""A plan as tables for a terminal of 100 columns."""

import math

import rich.box
import rich.console
import rich.table
import rich.text

from v4train import recipe as recipe_lib
from v4train.model import flops
from v4train.plan import comms, cost, estimate, low_precision, machine, memory, report, search, timing

_WIDTH = 100
_BAR = 24


def show(plan: estimate.Estimate, *, remedy: search.Change | None) -> None:
    """Prints a plan."""
    console = _console()
    console.print(rich.text.Text(f"{plan.recipe.name} on {plan.on.label}", style="bold"), f"· mesh {axes(plan.recipe.mesh.sizes)}")
    console.print()
    console.print(_parameters(plan))
    if len(plan.phases) > 1:
        console.print()
        console.print(_course(plan))
    for phase in plan.phases:
        console.print(rich.text.Text(f"\n{_heading(plan, phase)}", style="bold"))
        for table in (_memory(plan, phase), _flops(plan, phase), _transfers(plan, phase), _time(plan, phase)):
            console.print()
            console.print(table)
    console.print()
    console.print(_cost(plan))
    console.print()
    _verdict(plan, remedy, console)


def show_candidates(found: list[search.Candidate], *, recipe: recipe_lib.Recipe, on: machine.Machine) -> None:
    """Prints ranked meshes."""
    order = "the fastest that fits first" if found[0].fits else "none fits, the one that lacks least first"
    table = _table(f"Meshes for {on.label}, {order}", "replica", "fsdp", "expert", "context", "tensor", "microbatches")
    for name in ("GB/device", "s/step", "MFU"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in found:
        sizes = [str(size) if size > 1 else "·" for size in one.recipe.mesh.sizes.values()]
        times = one.phase.timing
        figures = [f"{one.total / 1e9:.1f}", _seconds(times.step), f"{times.mfu:.1%}"]
        style = None if one.fits else "red"
        table.add_row(*sizes, str(one.recipe.train.microbatches), *figures, "fits" if one.fits else "too large", style=style)
    console = _console()
    console.print(table)
    best = found[0].recipe
    pairs = [(f"mesh.{name}", size, recipe.mesh.sizes[name]) for name, size in best.mesh.sizes.items()]
    pairs.append(("train.microbatches", best.train.microbatches, recipe.train.microbatches))
    changes = [f"--set {name}={value}" for name, value, now in pairs if value != now]
    console.print(f"\nthe first: {' '.join(changes) or 'as the recipe has it'}", soft_wrap=True)


def axes(sizes: dict[str, int]) -> str:
    """``fsdp 2 x expert 16``."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "of one device"


def _console() -> rich.console.Console:
    console = rich.console.Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else rich.console.Console(highlight=False, width=_WIDTH)


def _table(title: str, *numbers: str) -> rich.table.Table:
    table = rich.table.Table(
        title=title, title_justify="left", title_style="bold cyan", box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _heading(plan: estimate.Estimate, phase: estimate.Phase) -> str:
    rows, length = phase.shape.rows, phase.shape.sequence_length
    place = memory.place_of(plan.recipe, phase.shape)
    local = f"{place.rows} x {place.tokens:,}" if place.rows > 1 else f"{place.tokens:,}"
    attention = f"{phase.attention} attention; " if len({one.attention for one in plan.phases}) > 1 else ""
    return (
        f"{phase.steps:,} steps of {rows:,} rows x {length:,} = {_short(phase.shape.places)} tokens; {attention}"
        f"a device has {local} in each of {plan.recipe.train.microbatches} microbatches"
    )


def _parameters(plan: estimate.Estimate) -> rich.table.Table:
    counted = plan.parameters
    table = _table("Parameters")
    for name in ("", "in all", "share", "on a device"):
        table.add_column(name, justify="right" if name else "left")
    for kind, size in sorted(counted.by_kind.items(), key=lambda item: -item[1]):
        table.add_row(kind.replace("_", " "), _short(size), f"{size / counted.total:.1%}", _short(plan.stored_by_kind[kind]))
    table.add_section()
    table.add_row("total", _short(counted.total), "", "", style="bold")
    table.add_row("active per token", _short(counted.active), f"{counted.active / counted.total:.1%}", "")
    if counted.mtp:
        table.add_row("MTP block, apart", _short(counted.mtp), "", _short(plan.stored_by_kind["mtp"]))
    return table


def _course(plan: estimate.Estimate) -> rich.table.Table:
    """The parts of a run that has several, in the order in which it first has them."""
    table = _table("The course of the run, each part below", "rows", "length")
    table.add_column("attention")
    for name in ("steps", "tokens", "GB/device", "s/step", "MFU", "days"):
        table.add_column(name, justify="right")
    share = plan.bill.tokens / sum(phase.steps * phase.shape.places for phase in plan.phases)
    days = [share * phase.steps * phase.timing.step / 86_400 for phase in plan.phases]
    for phase, took in zip(plan.phases, days, strict=True):
        held = phase.memory.total
        figures = [f"{held / 1e9:.1f}", _seconds(phase.timing.step), f"{phase.timing.mfu:.1%}", f"{took:,.1f}"]
        shape = [f"{phase.shape.rows:,}", f"{phase.shape.sequence_length:,}", phase.attention or ""]
        style = None if held <= plan.on.usable_bytes else "red"
        table.add_row(*shape, f"{phase.steps:,}", _short(share * phase.steps * phase.shape.places), *figures, style=style)
    table.add_section()
    whole = [f"{sum(phase.steps for phase in plan.phases):,}", _short(plan.bill.tokens), "", "", "", f"{sum(days):,.1f}"]
    table.add_row("", "", "", *whole, style="bold")
    return table


def _memory(plan: estimate.Estimate, phase: estimate.Phase) -> rich.table.Table:
    held, usable = phase.memory, plan.on.usable_bytes
    table = _table(f"Memory of a device, most during {held.moment}")
    unit, letters = (1e9, "GB") if held.total >= 1e9 else (1e6, "MB")
    for name in ("", letters, ""):
        table.add_column(name, justify="right" if name else "left")
    for cause, size in held.at_peak.items():
        table.add_row(memory.CAUSES[cause], f"{size / unit:,.2f}", _bar(size / max(held.total, usable)))
    table.add_section()
    fits = held.total <= usable
    verdict = (
        f"of {usable / 1e9:,.1f} GB usable ({plan.on.chip.hbm_bytes / 1e9:,.0f} x {machine.USABLE}): {'fits' if fits else 'does NOT fit'}"
    )
    table.add_row("total", f"{held.total / unit:,.2f}", verdict, style="bold green" if fits else "bold red")
    table.add_row("not in it: keys and entries, if kept for evaluation", f"{held.evaluation / unit:,.2f}", "", style="dim")
    return table


def _flops(plan: estimate.Estimate, phase: estimate.Phase) -> rich.table.Table:
    model, length = phase.model, phase.shape.sequence_length
    once, thrice = flops.forward(model, length=length), flops.training(model, length=length)
    unit, letters = (1e9, "GFLOP") if thrice.total >= 10e9 else (1e6, "MFLOP")
    table = _table(f"{letters} a token, forward, at {length:,} tokens a row")
    for name in ("", "layers", "projections", "experts", "window", "entries", "indexer", "one", "all"):
        table.add_column(name, justify="right" if name else "left")
    for kind, one in report.by_layer_kind(model, length=length).items():
        parts = [one[name] for name in ("projections", "experts", "window", "entries", "indexer", "total")]
        phase_name = getattr(model.kind(kind), "phase", "")
        label = f"{kind} ({phase_name})" if phase_name else kind
        table.add_row(label, str(one["layers"]), *(_figure(x, unit) for x in parts), _figure(one["layers"] * one["total"], unit))
    blank = [""] * 7
    table.add_row("head", *blank, _figure(once.head, unit))
    if once.mtp:
        table.add_row("MTP block", *blank, _figure(once.mtp, unit))
    table.add_section()
    table.add_row("training", *blank, _figure(thrice.total, unit), style="bold")  # recomputation earns no credit
    return table


def _transfers(plan: estimate.Estimate, phase: estimate.Phase) -> rich.table.Table:
    table = _table("What a device sends in a step")
    for name, justify in (("", "left"), ("collective", "left"), ("over", "left"), ("GB", "right"), ("s alone", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    rows = report.timed(plan, phase)
    for one, seconds in rows:
        if one.sent >= 1e6:
            table.add_row(comms.PURPOSES[one.what], one.kind, " x ".join(one.axes), _figure(one.sent, 1e9), _seconds(seconds))
    if not rows:
        table.add_row("nothing: one device", "", "", "", "")
    return table


def _time(plan: estimate.Estimate, phase: estimate.Phase) -> rich.table.Table:
    times = phase.timing
    table = _table("Time of a step, estimated")
    for name in ("", "s", ""):
        table.add_column(name, justify="right" if name else "left")
    parts = {
        "matrix products": (times.products, "recomputation included"),
        "vector work": (times.vector, "bound by memory bandwidth"),
        "network, not hidden": (times.exposed, f"of {_seconds(sum(times.network.values()))} s"),
        "optimizer": (times.optimizer, f"Newton-Schulz, its exchange, the update; {_optimizer_share(times):.1%} of the FLOPs"),
    }
    for name, (seconds, remark) in parts.items():
        table.add_row(name, _seconds(seconds), rich.text.Text(_bar(seconds / times.step)).append(f" {remark}", style="dim"))
    table.add_section()
    rate = times.tokens / times.step
    table.add_row(
        "step", _seconds(times.step), f"{_short(rate)} tokens/s, {rate / plan.on.devices:,.0f} a device; MFU {times.mfu:.1%}", style="bold"
    )
    return table


def _optimizer_share(times: timing.Timing) -> float:
    return times.update.total / (times.update.total + times.flops)


def _cost(plan: estimate.Estimate) -> rich.table.Table:
    bill, v3 = plan.bill, report.reference()
    table = _table(f"Cost at ${plan.price:g} a chip hour")
    for name in ("", "tokens", "chips", "chip hours", "days", "dollars"):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, tokens: float, chips: int, hours: float, price: float, style: str | None = None) -> None:
        one = cost.bill(tokens=tokens, hours=hours, chips=chips, price=price)
        table.add_row(name, _short(tokens), f"{chips:,}", _short(hours), f"{one.days:,.1f}", f"${_short(one.dollars)}", style=style)

    row(f"{plan.recipe.name}, estimated", bill.tokens, plan.on.devices, bill.chip_hours, plan.price, "bold")
    row(f"the same at DeepSeek-V3's MFU of {v3['mfu']:.1%}", bill.tokens, plan.on.devices, plan.chip_hours(mfu=v3["mfu"]), plan.price)
    table.add_section()
    tokens = sum(stage["tokens"] for stage in v3["stages"])
    row("DeepSeek-V3, published", tokens, cost.V3_CHIPS, v3["published_total_hours"], plan.price)
    row("the same by formula, at that MFU", tokens, cost.V3_CHIPS, v3["total_hours"], plan.price)
    return table


def _verdict(plan: estimate.Estimate, remedy: search.Change | None, console: rich.console.Console) -> None:
    a = plan.assumed
    console.print(
        rich.text.Text(
            f"Assumed, not measured: {a.matmul:.0%} of the bf16 peak in dense products, {a.experts:.0%} in grouped ones, "
            f"{a.attention:.0%} in attention, {a.indexer:.0%} in index scores; {a.memory:.0%} of memory and {comms.EFFICIENCY:.0%} of "
            f"network bandwidth; parameters travel behind {a.hidden:.0%} of the products, all else is waited for; balanced experts.",
            style="dim",
        )
    )
    if low := low_precision.words(plan.recipe, on=plan.on, platform=estimate.platform_of(plan.on), share=a.fp8):
        console.print(rich.text.Text(low, style="dim"))
    if plan.fits:
        return
    worst = plan.worst.memory
    largest = sorted(worst.at_peak.items(), key=lambda item: -item[1])[:3]
    causes = ", ".join(f"{memory.CAUSES[cause]} {size / 1e9:.1f} GB" for cause, size in largest)
    over = (worst.total - plan.on.usable_bytes) / 1e9
    console.print(f"\n[bold red]It does not fit: {over:.1f} GB too much.[/] The largest: {causes}.")
    if remedy is None:
        console.print(
            "No single setting, pair of settings, mesh or up to 64 times the chips makes it fit: the model is too large for this chip."
        )
        return
    chips = f" on {remedy.devices:,} chips" if remedy.devices != plan.on.devices else ""
    words = " ".join(f"--set {setting}" for setting in remedy.settings)
    console.print(
        f"The smallest change that fits: [bold]{words}[/]{chips}: {remedy.total / 1e9:.1f} GB, {_seconds(remedy.step)} s a step.",
        soft_wrap=True,
    )


def _bar(share: float) -> str:
    eighths = round(min(max(share, 0.0), 1.0) * _BAR * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + ("" if rest == 0 else " ▏▎▍▌▋▊▉"[rest])


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def _figure(number: float, unit: float) -> str:
    return f"{number / unit:,.2f}" if number >= unit / 100 or number == 0 else f"{number / unit:.2g}"


def _seconds(seconds: float) -> str:
    if seconds == 0:
        return "0"
    return f"{seconds:,.1f}" if seconds >= 10 else f"{seconds:.{max(0, 2 - math.floor(math.log10(seconds)))}f}"
