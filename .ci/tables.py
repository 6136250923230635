"""Retrain the models and print the two tables of README.md in Markdown: `.venv/bin/python .ci/tables.py [SEED ...]`.

Each setting is a copy of the code with some edits, trained and graded once per seed. The cells are medians over the
seeds. All copies are made before the first training, so an edit that no longer fits the code fails at once.
"""

import argparse
import pathlib
import re
import shutil
from statistics import median
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

# An edit has a file, the text to replace, the number of times that it must occur, and the replacement.
HE = ("vae.py", '"he_uniform"', 1, '"glorot_uniform"')
ROWS = ("vae.py", "initialize_label_rows(part.weights[0], num_classes)", 1, "pass")
ENCODER_ROWS = ("vae.py", " initialize_label_rows(part", 1, " part is self.decoder and initialize_label_rows(part")
LOGVAR = ("vae.py", "INITIAL_LOGVAR = -2.0", 1, "INITIAL_LOGVAR = 0.0")
RATE = ("assignment.py", "Adam(rate, beta_2=", 1, "Adam(args.learning_rate, beta_2=")
BETA_2 = ("assignment.py", ", beta_2=max(0.95, 0.999 ** (args.batch_size / 16))", 1, "")

TRAIN_VAE = """import assignment
args = assignment.parseArguments()
assignment.tf.keras.utils.set_random_seed(args.seed)
model = (assignment.CVAE if args.is_cvae else assignment.VAE)(args.input_size)
loader = assignment.load_mnist(args.batch_size, buffer_size=assignment.TRAINING_IMAGES)
for _ in range(args.num_epochs):
    print("Loss:", assignment.train_vae(model, loader, args, args.is_cvae) / len(loader))
assignment.save_model_weights(model)"""
PROGRAMS = {"`assignment.py`": ["assignment.py"], "`train_vae` called directly": ["-c", TRAIN_VAE]}
PROGRAM, DIRECT = PROGRAMS
BOTH = ("VAE", "CVAE")

# A setting has a program, a batch size, the models to train, and edits. The README lists the changes (1) to (4).
SETTINGS = {
    "all four changes": (PROGRAM, 1024, BOTH, []),
    "without (1)": (PROGRAM, 1024, BOTH, [HE]),
    "without (2)": (PROGRAM, 1024, ("CVAE",), [ROWS]),
    "with (2) in the decoder only": (PROGRAM, 1024, ("CVAE",), [ENCODER_ROWS]),
    "without (3)": (PROGRAM, 1024, BOTH, [LOGVAR]),
    "without (4)": (DIRECT, 1024, BOTH, []),
    "without the learning rate of (4)": (PROGRAM, 1024, BOTH, [RATE]),
    "without the beta_2 of (4)": (PROGRAM, 1024, BOTH, [BETA_2]),
    "baseline": (DIRECT, 1024, BOTH, [HE, ROWS, LOGVAR]),
    "all four changes, batches of 128": (PROGRAM, 128, BOTH, []),
    "without (4), batches of 128": (DIRECT, 128, BOTH, []),
    "baseline, batches of 128": (DIRECT, 128, BOTH, [HE, ROWS, LOGVAR]),
}


def copy_code(folder, edits):
    """Copy the code to `folder`, beside a link to the data, and make the edits."""
    shutil.copytree(ROOT / "code", folder / "code", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    (folder / "data").symlink_to(ROOT / "data")
    for name, old, count, new in edits:
        path = folder / "code" / name
        source = path.read_text(encoding="utf-8")
        if source.count(old) != count:
            sys.exit(f"error: expected {old!r} {count}x in {name}, found it {source.count(old)}x: adapt {__file__}")
        path.write_text(source.replace(old, new), encoding="utf-8")


def run(code, *arguments, check=True):
    """Run Python in the folder `code` and return what it prints."""
    return subprocess.run([sys.executable, *arguments], cwd=code, stdout=subprocess.PIPE, text=True, check=check).stdout


def measure(code, setting, seed):
    """Train and grade the models of a setting; return a dictionary of losses, KL divergences and accuracies."""
    program, batch_size, models, _ = SETTINGS[setting]
    found = {}
    for model in models:
        flags = [f"--seed={seed}", f"--batch_size={batch_size}", *["--is_cvae"] * (model == "CVAE")]
        found[f"{model} training"] = re.findall(r"Loss: (\S+)", run(code, *PROGRAMS[program], *flags))[-1]
    grade = run(code, "evaluate.py", check=False)  # a FAIL is a result too
    for model in models:
        found[f"{model} test"], found[f"{model} KL"] = re.search(rf"\b{model}: loss (\S+) .* KL (\S+)", grade).groups()
    found["accuracy"], found["worst digit"] = re.search(r"accuracy (\S+)% .* worst digit (\S+)%", grade).groups()
    return {name: float(number) for name, number in found.items()}


def tables(measured):
    """Yield the lines of both tables, given the measurements of each setting."""
    medians = {key: {name: median(one[name] for one in runs) for name in runs[0]} for key, runs in measured.items()}
    yield "| after 10 epochs | VAE training loss | CVAE training loss | accuracy |\n|---|---|---|---|"
    for setting, (program, batch_size, _, edits) in SETTINGS.items():
        if not edits:
            row = "| {}, batches of {} | {VAE training:.1f} | {CVAE training:.1f} | {accuracy:.2f}% |"
            yield row.format(program, batch_size, **medians[setting])
    yield "| required by the handout | below 120 | below 120 | above 90% |\n"
    yield "| test set | VAE loss (KL) | CVAE loss (KL) | accuracy (range) | worst digit |\n|---|---|---|---|---|"
    for setting, (_, _, models, _) in SETTINGS.items():
        losses = "{VAE test:.1f} ({VAE KL:.1f})" if "VAE" in models else "not affected"
        losses += " | {CVAE test:.1f} ({CVAE KL:.1f})"
        accuracies = [one["accuracy"] for one in measured[setting]]
        row = f"| {{}} | {losses} | {{accuracy:.2f}}% ({{:.2f}} to {{:.2f}}) | {{worst digit:.1f}}% |"
        yield row.format(setting, min(accuracies), max(accuracies), **medians[setting])


def main():
    """Make the edited copies, train and grade them, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", metavar="SEED", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--check", action="store_true", help="only check that every edit fits the code")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for setting, (*_, edits) in SETTINGS.items():
            copy_code(pathlib.Path(root, setting), edits)
        if args.check:
            return
        print("Three seeds take an hour or more on two cores.", flush=True)
        measured = {}
        for setting in SETTINGS:
            measured[setting] = [measure(pathlib.Path(root, setting, "code"), setting, seed) for seed in args.seeds]
            print(f"{len(measured)}/{len(SETTINGS)}: {setting}: {measured[setting]}", flush=True)
        print(*tables(measured), sep="\n")


if __name__ == "__main__":
    main()
