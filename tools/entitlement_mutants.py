"""Undoes one fix after another in the runtime's sources: tools/entitlement.py must turn red each time.

    python tools/entitlement_mutants.py              # all of them, in this checkout; some minutes each
    python tools/entitlement_mutants.py sticky n     # those whose names begin so

A mutant is an edit of patches/src or of vendor/llama.cpp that takes one fix back. It is applied, llama-server is built
again (only what the edit touches), the tool runs until something is wrong, and the sources are put back, also when this
is interrupted. Exit status: 0 every mutant was found, 1 one was not, 2 it could not be run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import entitlement

from llamamem.errors import LlamamemError
from llamamem.native.build import builds

ROOT = Path(__file__).resolve().parents[1]
CHECKS = 2000


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file` and becomes `new`; the first of the profiles that is red is enough."""

    name: str
    undoes: str
    file: str
    old: str
    new: str
    profiles: tuple[str, ...] = ("batched", "fused")


SERVER, RUNTIME = "vendor/llama.cpp/tools/server/", "patches/src/"
SLOTS, REQUESTS = RUNTIME + "server-adapter-mem-slots.cpp", RUNTIME + "server-adapter-mem.cpp"

# the key of a text, whole: what is left out of it is left out of the test for an empty one too
KEY = """    if (!origin && setting.frozen == def.frozen && setting.scale == def.scale && setting.lora == def.lora) {
        return "";
    }
    return string_format("%s %d %a %016llx", origin ? origin->sha256.c_str() : "", setting.frozen, setting.scale, """
PREPARE = """    params.is_own = task.id_slot >= 0 && !params.has_memory;

    const slot_memory   none;
    const slot_memory & own = params.is_own ? slots[task.id_slot] : none;

    params.origin  = params.is_own ? own.origin : params.memory;"""
SLOT_NUMBER = """    const bool is_int = value.is_number_integer();
    if (!is_int || value.get<double>() < 0 || value.get<double>() >= n_slots) {"""
DEFERRED = "    // all of them, in their order"
FIRST_DEFERRED = """    if (!queue_tasks_deferred.empty()) {
        auto it = queue_tasks_deferred.begin();
        while (it != queue_tasks_deferred.end() && it->id_slot != id_slot) {
            ++it;
        }
        it = it == queue_tasks_deferred.end() ? queue_tasks_deferred.begin() : it;
        queue_tasks.emplace_front(std::move(*it));
        queue_tasks_deferred.erase(it);
    }
    time_last_task = ggml_time_ms();
    condition_tasks.notify_one();
    return;
"""

MUTANTS: tuple[Mutant, ...] = (
    # the key
    # The comparison in server_tokens::get_common_prefix is not among them: without it a slot is chosen, or a text taken
    # out of the prompt cache, that is of another memory, and begin() drops that text: slower, and still right.
    Mutant(
        "clone", "a text in the prompt cache has no key", SERVER + "server-common.cpp", "    res.key      = key;\n", ""
    ),
    Mutant(
        "key-frozen",
        "a frozen text is taken for one that was written",
        SLOTS,
        KEY,
        KEY.replace("setting.frozen == def.frozen && ", "").replace("setting.frozen, ", "0, "),
    ),
    Mutant(
        "key-scale",
        "a text is the same at any scale",
        SLOTS,
        KEY,
        KEY.replace("setting.scale == def.scale && ", "").replace("setting.scale, ", "1.0, "),
    ),
    Mutant(
        "key-origin",
        "a text is the same on any memory",
        SLOTS,
        KEY,
        KEY.replace("!origin && ", "").replace('origin ? origin->sha256.c_str() : ""', '""'),
    ),
    # what a request runs on
    Mutant(
        "nobody",
        "who names no slot gets what slot 0 was given",
        SLOTS,
        PREPARE,
        PREPARE.replace(
            "own.origin : params.memory", "own.origin : params.has_memory ? params.memory : slots[0].origin"
        ),
    ),
    Mutant(
        "carried",
        "what is learnt on a memory in the request is the slot's",
        SLOTS,
        PREPARE,
        PREPARE.replace(" && !params.has_memory", "").replace(
            "params.is_own ? own.origin", "!params.has_memory ? own.origin"
        ),
    ),
    Mutant(
        "carried-setting",
        "a memory in the request is read under the slot's setting",
        SLOTS,
        "params.is_own ? slots[task.id_slot] : none",
        "task.id_slot >= 0 ? slots[task.id_slot] : none",
    ),
    Mutant(
        "null",
        "no memory, said so, is the slot's",
        REQUESTS,
        "params.has_memory = true;",
        "params.has_memory = memory.is_string();",
    ),
    Mutant(
        "begin-text",
        "the text of another memory stays in the slot",
        SLOTS,
        "if (prompt.tokens.empty() || prompt.tokens.key != task.tokens.key) {",
        "if (prompt.tokens.empty()) {",
    ),
    Mutant(
        "begin-origin",
        "a text begins on no memory",
        SLOTS,
        "llama_adapter_mem_seq_start(ctx, id_slot, params.origin ? params.origin->values.data() : nullptr);",
        "llama_adapter_mem_seq_start(ctx, id_slot, nullptr);",
    ),
    Mutant(
        "begin-setting",
        "the setting is that of the text before",
        SLOTS,
        "    llama_adapter_mem_seq_set(ctx, id_slot, params.setting.frozen, params.setting.scale);\n",
        "",
    ),
    Mutant(
        "messages",
        "/v1/messages passes on no memory",
        REQUESTS,
        '{ "memory_adapter", "rwkv_ms", "id_slot", "cache_prompt" }',
        '{ "cache_prompt" }',
    ),
    # what a slot learnt
    Mutant(
        "end-frozen",
        "a memory that was only read is learnt",
        SLOTS,
        "if (!params.is_own || params.setting.frozen || ",
        "if (!params.is_own || ",
    ),
    Mutant(
        "own",
        "a slot's memory is whatever is in it",
        SLOTS,
        "if (res.is_running || (!res.is_kept && prompt.tokens.key.empty())) {",
        "if (true) {",
    ),
    Mutant(
        "own-unnamed",
        "a slot that nobody named shows what came with a request",
        SLOTS,
        "(!res.is_kept && prompt.tokens.key.empty())",
        "!res.is_kept",
    ),
    Mutant(
        "erase",
        "an erased slot keeps its memory",
        SLOTS,
        '{ "n_erased", prompt.tokens.size() } };\n            slot = slot_memory();',
        '{ "n_erased", prompt.tokens.size() } };',
    ),
    Mutant(
        "reset",
        "a slot that was reset keeps its memory",
        SLOTS,
        'data = { { "id_slot", id_slot } };\n            slot = slot_memory();',
        'data = { { "id_slot", id_slot } };',
    ),
    Mutant(
        "sleep",
        "a sleep loses the slots' memories",
        SLOTS,
        "    slots.resize(n_slots);",
        "    slots.clear();\n    slots.resize(n_slots);",
    ),
    # files and saves
    Mutant(
        "file-setting",
        "a slot file is taken for one of the default setting",
        SLOTS,
        "    llama_adapter_mem_seq_get(ctx, id_slot, &slot.setting.frozen, &slot.setting.scale);\n",
        "",
    ),
    Mutant(
        "file-origin",
        "a slot file, a checkpoint and the prompt cache forget the memory that a text began on",
        RUNTIME + "llama-memory-adapter-state.cpp",
        "if (!has_origin || kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY) {",
        "if (true) {",
    ),
    Mutant(
        "continues", "a save continues whatever there is", SLOTS, 'if (!data.contains("continues")) {', "if (true) {"
    ),
    # slots, and their turns
    Mutant(
        "wrap",
        "slot numbers wrap",
        REQUESTS,
        SLOT_NUMBER,
        SLOT_NUMBER.replace("<double>() < 0 || value.get<double>() >= n_slots) {", "<int>() < -n_slots) {").replace(
            "if (!is_int",
            "if (is_int) {\n        return (value.get<int>() % n_slots + n_slots) % n_slots;\n    }\n    if (!is_int",
        ),
    ),
    Mutant("deferred", "only the first that waits has its turn", SERVER + "server-queue.cpp", DEFERRED, FIRST_DEFERRED),
    Mutant(
        "hang-up",
        "an action is done for a client that is gone",
        SLOTS,
        "asker.is_answered = asker.is_gone && !asker.is_gone();",
        "asker.is_answered = true;",
    ),
    Mutant(
        "busy",
        "a request that waits touches the slot that it waits for",
        SERVER + "server-context.cpp",
        "the caller waits\n                if (ret->is_processing()) {",
        "the caller waits\n                if (false) {",
    ),
    # values
    Mutant(
        "scale", "a scale has no bounds", REQUESTS, "ADAPTER_MEM_SCALE_MAX = 16.0f;", "ADAPTER_MEM_SCALE_MAX = 3e38f;"
    ),
    Mutant(
        "finite",
        "values that are not finite get into the KV cache",
        RUNTIME + "ggml-rwkv-ms-impl.h",
        "if (lanes::any(bad)) {",
        "if (false) {",
    ),
)


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    path = ROOT / mutant.file
    before = path.read_text()
    if before.count(mutant.old) != 1:
        raise LlamamemError(
            f"{mutant.name}: its text stands {before.count(mutant.old)} times in {mutant.file}, not once"
        )
    try:
        path.write_text(before.replace(mutant.old, mutant.new))
        yield
    finally:
        path.write_text(before)


def compiled(build: Path) -> None:
    line = ["ninja", "-C", str(build), "llama-server"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != 0:
        raise LlamamemError(f"it does not compile: {done.stdout[-600:]}")


def found_by(mutant: Mutant, bin_dir: Path, right_dir: Path, seed: int) -> str:
    """What was wrong first and after how many checks; nothing when all was right."""
    for profile in mutant.profiles:
        with tempfile.TemporaryDirectory(prefix="llamamem-mutant-") as name:
            proof = entitlement.prove(profile, seed, CHECKS, Path(name), bin_dir=bin_dir, right_dir=right_dir)
        if proof.fault is not None:
            return f"{profile}, check {proof.tally.checks}: {proof.fault.what[:110]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; all, if none is given")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    chosen = [one for one in MUTANTS if not args.names or one.name.startswith(tuple(args.names))]
    made = [build for build in builds() if build.backend == "cpu"]
    if not made or not chosen:
        raise LlamamemError("no build here: run `llamamem build`" if chosen else "no mutant has such a name")
    root, missed = made[0].root, []
    with tempfile.TemporaryDirectory(prefix="llamamem-right-") as right:
        shutil.copytree(made[0].bin_dir, right, dirs_exist_ok=True)  # for the reference, which no mutant touches
        try:
            for mutant in chosen:
                with applied(mutant):
                    compiled(root)
                    what = found_by(mutant, made[0].bin_dir, Path(right), args.seed)
                print(f"{'found ' if what else 'MISSED'}  {mutant.name:<28} {mutant.undoes}\n{'':8}{what}", flush=True)
                missed += [] if what else [mutant.name]
        finally:
            compiled(root)  # of the sources as they were
    print(f"{len(chosen)} mutants, {len(missed)} not found{': ' if missed else ''}{', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LlamamemError, RuntimeError) as e:
        print(f"entitlement_mutants: {e}", file=sys.stderr)
        sys.exit(2)
