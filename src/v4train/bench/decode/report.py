"""The results of `v4train bench decode` as tables for reading."""

from typing import Any


def memory(result: dict[str, Any]) -> str:
    """Bytes by part and length."""
    names = [name for name in result["lengths"][0]["fp8"] if name not in ("total", "draft", "table")]
    lines = ["one sequence, MB: parts of the fp8 cache; all of it, and saved against bf16; on the device with tiers, and saved against fp8"]
    lines.append(f"{'tokens':>10}" + "".join(f"{n:>10}" for n in (*names, "fp8", "bf16")) + f"{'saved':>8}{'tiers':>10}{'saved':>8}")
    for row in result["lengths"]:
        cells = [row["fp8"][name] for name in names] + [row["fp8"]["total"], row["bf16"]["total"]]
        text = "".join(f"{cell / 1e6:>10.1f}" for cell in cells)
        tiers = f"{row['device']['total'] / 1e6:>10.1f}{row['saved_on_device']:>8.1%}"
        lines.append(f"{row['length']:>10,}{text}{row['saved']:>8.1%}{tiers}")
    per_token = result["per_token_bytes"]
    lines.append(f"a token: {per_token['bf16']:,.1f} bytes in bf16, {per_token['fp8']:,.1f} in fp8 ({result['per_token_saved']:.1%} less)")
    lines.append(f"tiers with {result['hot_entries']:,} hot entries a layer save something from {result['crossover_tokens']:,} tokens on")
    return "\n".join(lines)


def speed(result: dict[str, Any]) -> str:
    """Milliseconds by mode and length."""
    lines = []
    if result["attention"]:
        modes = list(result["attention"][0]["modes"])
        lines.append("attention of one CSA layer, one token, ms of a core (of which the scan of the index)")
        lines.append(f"{'tokens':>10}" + "".join(f"{mode:>20}" for mode in modes) + f"{'fp8 vs dense bf16':>20}")
        for row in result["attention"]:
            cells = []
            for mode in modes:
                one = row["modes"][mode]
                scan = f" ({one['scan_cpu']:.1f})" if "scan_cpu" in one else ""
                cells.append(f"{one['attention_cpu']:.1f}{scan}")
            by_core, by_clock = f"{row['speedup_cpu']:.2f}x", f"{row['speedup']:.2f}x by the clock"
            lines.append(f"{row['length']:>10,}" + "".join(f"{cell:>20}" for cell in cells) + f"{by_core:>20} ({by_clock})")
    for step in result["steps"]:
        modes = list(step["rows"][0]["modes"])
        lines.append(f"whole decode step of {step['sequences']} sequence(s), ms (of a core)")
        lines.append(f"{'tokens':>10}" + "".join(f"{mode:>20}" for mode in modes))
        for row in step["rows"]:
            cells = (f"{row['modes'][mode]:,.1f} ({row['cpu'][mode]:,.1f})" for mode in modes)
            faster = f"{row['speedup']:.2f}x ({row['speedup_cpu']:.2f}x)" if "speedup" in row else ""
            lines.append(f"{row['length']:>10,}" + "".join(f"{cell:>20}" for cell in cells) + f"{faster:>20}")
        growth = step["growth"]
        if growth is not None:
            lines.append(
                f"sparse-fp8 from {growth['from']:,} to {growth['to']:,} tokens: {growth['whole'] - 1:+.1%}, "
                f"without the scan of the index {growth['without_scan'] - 1:+.1%}; in seconds of a core "
                f"{growth['whole_cpu'] - 1:+.1%} and {growth['without_scan_cpu'] - 1:+.1%}"
            )
    return "\n".join(lines)


def latency(result: dict[str, Any]) -> str:
    """Bytes by tier and times by length and mode."""
    lines = [
        "one sequence: a step of two of V4-Flash's layers (CSA, HCA), bytes of their cache; first token in a model of small widths",
        f"{'tokens':>10}  {'cache':<18}{'device MB':>10}{'host MB':>9}{'disk MB':>9}"
        f"{'ms a token':>12}{'of a core':>11}{'found hot':>11}{'first, s':>10}",
    ]
    for row in result["lengths"]:
        for mode, one in row["modes"].items():
            sizes = "".join(f"{one['bytes'].get(name, 0) / 1e6:>{width}.1f}" for name, width in (("device", 10), ("host", 9), ("disk", 9)))
            hot = f"{one['hot']:.0%}" if "hot" in one else ""
            first = f"{one['first_token_seconds']:.2f}" if "first_token_seconds" in one else ""
            lines.append(f"{row['length']:>10,}  {mode:<18}{sizes}{one['ms']:>12.1f}{one['cpu_ms']:>11.1f}{hot:>11}{first:>10}")
    return "\n".join(lines)


def quality(result: dict[str, Any]) -> str:
    """Perplexity, agreement, recall and needles."""
    lines = [f"{result['run']}, step {result['step']}", f"{'cache':>6}{'perplexity':>12}{'agrees':>9}{'KL(bf16)':>12}"]
    for name, one in result["caches"].items():
        lines.append(f"{name:>6}{one['perplexity']:>12.5f}{one['agreement']:>9.3%}{one['divergence']:>12.2e}")
    index = result["index"]
    lines.append(f"perplexity of fp8 against bf16: {result['perplexity_change']:+.3%}; over {result['caches']['fp8']['targets']:,} targets")
    lines.append(f"index recall of fp8 keys: {index['recall']:.2%} over {index['queries']:,} queries")
    lines.append(f"{'length':>8}{'depth':>7}{'bf16':>8}{'fp8':>8}   needles found")
    lines += [f"{row['length']:>8,}{row['depth']:>7.2f}{row['bf16']:>8.0%}{row['fp8']:>8.0%}" for row in result["needles"]]
    return "\n".join(lines)
