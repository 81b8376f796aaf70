"""What docs/performance.md says of each kind of record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpt_dist.training.reporting.formatting import counted

Record = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, figures to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def training(found: Record) -> str:
    rows = []
    for result in found["results"]:
        for name, values in result["trainers"].items():
            rows.append(
                [
                    f"{name}, {result['micro_batch']} × {found['context']}, "
                    f"{result['accumulate']} a step",
                    f"{values['tokens_per_second']:,.0f} "
                    f"({values['lowest']:,.0f}–{values['highest']:,.0f})",
                    f"{values['of_peak']:.1%}",
                    f"{values['peak_gb']:.2f} GB",
                ]
            )
    ratios = [
        f"{result['ratio_to_best_peer']:.2f}× the best peer at {result['accumulate']} a step"
        for result in found["results"]
        if "ratio_to_best_peer" in result
    ]
    precision = found.get("precision", "bf16")
    preset = {"124m": "gpt2-124m"}.get(found["shape"], found["shape"])
    title = f"Shape of `{preset}`, {precision}, on {found['device']}: {', '.join(ratios)}."
    share = f"share of the {precision} matmul peak"
    return f"{title}\n\n" + table(["trainer, micro-batch", "tokens/s", share, "peak memory"], rows)


def serving(found: Record) -> str:
    speeds = found["tokens_per_second"]
    batches = list(next(iter(speeds.values())))
    rows = [
        [name]
        + [
            "{median:,.0f} ({lowest:,.0f}–{highest:,.0f})".format(**values[batch])
            for batch in batches
        ]
        for name, values in speeds.items()
    ]
    rows += [
        [f"**{name}**"] + [f"**{values[batch]:.2f}×**" for batch in batches]
        for name, values in found["ratios"].items()
    ]
    shares = ", ".join(
        f"{dtype} {facts['share_of_bandwidth']:.0%} of {facts['bandwidth_gb_per_second']:.0f} GB/s"
        for dtype, facts in found["batch_1"].items()
    )
    return (
        "Random 124M weights, 64-token prompts, 64 new tokens, top-k 50, tokens/s:\n\n"
        + table(["engine", *(f"batch {batch}" for batch in batches)], rows)
        + f"\n\nMemory bandwidth ÷ bytes of weights at batch 1: {shares}."
    )


def speculation(found: Record) -> str:
    def cell(values: Record) -> str:
        speed = values["tokens_per_second"]["auto"]
        return "{ratio:.2f}× ({lowest:.2f}–{highest:.2f}), ".format(**values) + f"{speed:,.0f}"

    texts = found["by_text"]
    batches = list(next(iter(texts.values())))
    rows = [[text, *(cell(values[batch]) for batch in batches)] for text, values in texts.items()]
    return (
        f"Tokens/s with `--speculate auto` ÷ tokens/s without, and tokens/s with it; "
        f"{found['model']}, backend `{found['backend']}`:\n\n"
        + table(["text", *(f"batch {batch}" for batch in batches)], rows)
        + "\n\nOne token for each pass over the weights would be at most "
        f"{found['one_token_a_pass_per_second']:,.0f} tokens/s at batch 1."
    )


def architectures(found: Record) -> str:
    names = list(found["parameters"])
    rows = []
    for each in found["results"]:
        steps = each["step_seconds"]
        cells = (
            f"{each['batch'] / steps[name]:,.0f} ({steps['gpt2'] / steps[name]:.2f}×)"
            for name in names
        )
        rows.append([f"{each['dtype']}, batch {each['batch']}", *cells])
    sizes = ", ".join(f"{name} {count / 1e6:.0f}M" for name, count in found["parameters"].items())
    return (
        f"Tokens/s, and that of gpt2 = 1; 12 layers of width 768, a head of its own ({sizes} "
        f"parameters), backend `{found['backend']}`:\n\n" + table(["weights", *names], rows)
    )


def serving_rpc(found: Record) -> str:
    if "median_share" in found:
        shares = sorted(found["shares"])
        return (
            f"{found['streams']} concurrent streams through gRPC reach "
            f"{found['median_share']:.1%} ({shares[0]:.1%}–{shares[-1]:.1%}) of the decoder called "
            f"directly ({found['dtype']}; the load generator shares the cores)."
        )
    if "slowest_chunk_ms" in found:
        return (
            f"A {found['joining_prompt_tokens']}-token prompt joins {found['running_streams']} "
            f"streams: gaps between their tokens of at most "
            f"{found['gap_ms_while_joining']['max']:.0f} ms, where a chunk of "
            f"{found['chunk_tokens']} tokens takes up to {found['slowest_chunk_ms']:.0f} ms alone, "
            f"a step and a chunk {found['step_plus_chunk_ms']:.0f} ms and the whole prompt "
            f"{found['whole_prompt_ms']:.0f} ms."
        )
    if "floods" in found:
        return floods(found)
    if "seconds_to_ready" in found:
        return f"From the command to ready: {found['median']:.2f} s ({found['dtype']})."
    memory, calls = found["server_memory_mb"], found["calls"]
    return (
        f"{found['clients']} clients on a capacity of {found['capacity']} for "
        f"{found['seconds']:.0f} s: {calls['OK']:,} calls completed, "
        f"{calls['RESOURCE_EXHAUSTED']:,} refused; a refusal takes "
        f"{found['server_side_rejection_ms']['p99']:.2f} ms in the server at the 99th percentile; "
        f"its memory goes from {memory['first']:.0f} to {memory['last']:.0f} MB."
    )


def floods(found: Record) -> str:
    def figures(watched: Record, name: str) -> str:
        return " / ".join(f"{watched[name][key]:.0f}" for key in ("p50", "p99", "max"))

    rows = [
        [
            flood,
            *(figures(watched, f"health_{name}_ms") for name in ("grpc", "http")),
            figures(watched, "stream_gap_ms"),
            ", ".join(f"{n:,} {code}" for code, n in watched.get("flood_ended", {}).items()),
        ]
        for flood, watched in found["floods"].items()
    ]
    head = (
        f"{found['connections']} connections send requests of this size to every method for "
        f"{found['seconds']:.0f} s, beside health checks and two streams "
        f"({found['dtype']}; ms: median / 99th percentile / longest):"
    )
    columns = ["flood", "health, gRPC", "health, HTTP", "between tokens", "the flood's calls ended"]
    return f"{head}\n\n" + table(columns, rows)


def data(found: Record) -> str:
    rows = [
        [
            "prepare, 50 MB, beside tiktoken alone with as many threads",
            f"{found['throughput']['ratio_median']:.2f}×",
        ],
        *(
            [f"most memory on 5 GB, {kind}", f"{values['peak_megabytes']:.0f} MB"]
            for kind, values in found["memory"]["kinds"].items()
        ),
        *(
            [f"loader, {shape}", f"{values['median']:.0f} M tokens/s"]
            for shape, values in found["loader"]["figures"].items()
        ),
    ]
    return table(["what", "figure"], rows)


def scaling(found: Record) -> str:
    unit = next(iter(found["table"][0]))
    rows = [
        [str(row[unit]), f"{row['tokens_per_second']:,.0f}", f"{row['speed_up']:.3f}"]
        for row in found["table"]
    ]
    return table([unit, "tokens/s", "times"], rows)


def checkpoint(found: Record) -> str:
    costs = ", ".join(f"{cost:.2f}" for cost in found["cost_of_a_checkpoint_s"])
    return (
        f"A checkpoint of {found['checkpoint_GB']} GB adds {costs} s to steps of "
        f"{found['step_s']} s: {found['every_10_steps']:.1%} every 10 steps, "
        f"{found['every_100_steps']:.2%} every 100."
    )


def faults(found: Record) -> str:
    rows = [
        *([kind, str(count)] for kind, count in found["faults"].items()),
        ["recoveries", str(found["recoveries"])],
        ["most steps lost", f"{found['most_steps_lost']} of {found['checkpoint_interval']}"],
        ["longest stall", f"{found['longest_stall_s']} s"],
        ["files that differ from the quiet run", str(len(found["differences"]))],
        ["processes left", str(len(found["processes_left"]))],
    ]
    return table(["fault", "count"], rows)


def soak(found: Record) -> str:
    rows = [
        [
            storm["test"],
            ", ".join(f"{count:,} {name}" for name, count in storm["ended"].items()),
            ", ".join(storm["nothing_kept_of"]),
            f"{storm['seconds']} s",
        ]
        for storm in found["storms"]
    ]
    return table(["storm", "ended", "nothing was kept of", "time"], rows)


def learning(found: Record) -> str:
    rows = []
    for name, values in found["recipes"].items():
        sweep = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in values["sweep"].items())
        beside = values.get("beside_the_first")
        rows.append(
            [
                name,
                values["parameters"],
                str(values["steps"]),
                f"{beside['share_of_steps']:.0%}" if beside else "",
                f"{values['lr']:g}",
                f"{values['mean']:.4f} ± {values['standard_deviation']:.4f}",
                f"{beside['lower_by']:+.4f}, {beside['p']:.1g}" if beside else "",
                sweep,
            ]
        )
    heads = ["recipe", "parameters", "steps", "of the first's", "lr", "validation loss"]
    heads += ["below the first by, p", "sweep on one seed"]
    return f"{found['data']}, {len(values['losses'])} seeds:\n\n" + table(heads, rows)


def muon_step(found: Record) -> str:
    rows = [[name, f"{v['least_cpu']:.2f} s"] for name, v in found["seconds"].items()]
    size = f"{counted(found['layers'], 'layer')} of GPT-2 {found['model'].upper()}"
    flops = ", ".join(f"{f:.3f}" for f in found["tflops_by_rank"])
    head = f"The matrices of {size}, {counted(found['threads'], 'thread')}; TFLOPs by rank: {flops}"
    return f"{head}.\n\n" + table(["optimizer", "CPU time of a step"], rows)


def startup(found: Record) -> str:
    names = {
        "help_s": "`gpt_dist.train --help`",
        "import_torch_s": "`import torch` alone, for comparison",
        "command_to_first_step_s": "command to the end of the first step",
        "resume_to_next_step_s": "command to the end of the next step, resuming",
        "step_s": "a step",
    }
    rows = [[names[key], f"{values['median']:.2f} s"] for key, values in found["figures"].items()]
    return f"`{found['config']}`:\n\n" + table(["what", "time"], rows)


def shakespeare(found: Record) -> str:
    losses, steps = found["validation_loss_over_the_whole_split"], found["steps"]
    rows = [[name, str(steps[name]), f"{loss:.4f}"] for name, loss in losses.items()]
    return f"{found['data']}:\n\n" + table(["run", "steps", "validation loss"], rows)


def gpu(found: Record) -> str:
    match found.get("part"):
        case "losses":
            gaps = found["largest_relative_difference_to_fp32"]
            rows = [
                [name, f"{values[0]:.4f}", f"{values[-1]:.4f}", f"{gaps[name]:.2e}"]
                for name, values in found["losses"].items()
            ]
            return table(["50 steps", "first loss", "last", "largest difference to fp32"], rows)
        case "resume":
            return (
                f"A run continued from step 15: {found['equal_losses']} of {found['steps']} losses "
                f"equal, largest relative difference {found['largest_relative_difference']:.1e}."
            )
        case "greedy":
            return (
                f"{found['tokens']} greedy tokens in fp32: at most "
                f"{found['largest_gap_to_the_best_logit']:.1e} below the best logit of an uncached "
                "forward pass."
            )
        case "decoding":
            rows = [
                [
                    name.replace("_", " "),
                    f"{values['tokens_per_second']:,.0f}",
                    f"{values['of_the_bandwidth_limit']:.1%}",
                ]
                for name, values in found.items()
                if name.startswith("batch_")
            ]
            return table(["decoding, bf16", "tokens/s", "of the memory-bandwidth limit"], rows)
    return training(found)


SECTIONS: dict[str, tuple[str, Callable[[Record], str], tuple[str, ...]]] = {
    "training": ("Training beside other trainers", training, ("transformers",)),
    "learning": ("Recipes beside each other", learning, ()),
    "switches": ("One change at a time", learning, ()),
    "muon_step": ("A step of Muon beside other implementations", muon_step, ()),
    "shakespeare": ("Losses on Shakespeare", shakespeare, ()),
    "startup": ("Start-up", startup, ()),
    "checkpoint": ("Checkpoints", checkpoint, ()),
    "faults": ("Faults", faults, ()),
    "scaling": ("Scaling", scaling, ()),
    "data": ("Data", data, ("tiktoken",)),
    "serving": ("Decoding beside other engines", serving, ()),
    "speculation": ("Decoding with speculation", speculation, ()),
    "architectures": ("Decoding nanochat beside GPT-2", architectures, ()),
    "serving_rpc": ("The server", serving_rpc, ("grpcio",)),
    "soak": ("Storms of calls", soak, ("grpcio",)),
    "gpu": ("One GPU", gpu, ()),
}
"""File name up to a hyphen → heading, text and peers, in the order of the page."""
