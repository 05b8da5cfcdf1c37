"""What the pages say is true: examples that need no files run, the operators' table is complete, the doctor and the demo pass."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import univid
from tests.small_pipeline import make
from tests.test_data import video
from univid import demo, doctor, ops
from univid.ops import dispatch
from univid.ops.explain import _OPERATORS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/operators.md", "docs/model.md")
EXAMPLE = re.compile(r"^```python\n(?P<code>.*?)^```\n(\n```text\n(?P<output>.*?)^```\n)?", re.DOTALL | re.MULTILINE)
END = "\f"  # printed after every example


on_each_device = pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])


def python(*arguments: str, stdin: str | None = None, gpu: bool = False) -> subprocess.CompletedProcess:
    environment = os.environ if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], input=stdin, capture_output=True, text=True, cwd=ROOT, env=environment
    )


def examples(page: str) -> tuple[str, list[str | None]]:
    """A page's Python blocks as one program, on the lines where the page has them, and what it says each of them prints
    (in a block ``text`` right below it) or None."""
    text = (ROOT / page).read_text()
    program, printed = "", []
    for block in EXAMPLE.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        program += "\n" * (line - program.count("\n")) + block["code"] + f"print({END!r})\n"
        printed.append(block["output"])
    return program, printed


@pytest.mark.parametrize("page", PAGES)
@on_each_device
def test_examples_run_as_printed(page, gpu):
    program, printed = examples(page)
    assert printed
    result = python("-", stdin=program, gpu=gpu)
    assert result.returncode == 0, f"{page}:\n{result.stderr}"
    if find_spec("triton") is None:
        return  # explain says so, where the page says more
    outputs = result.stdout.split(f"{END}\n")[:-1]
    for number, (output, expected) in enumerate(zip(outputs, printed, strict=True), 1):
        assert expected in (None, output), f"{page}, example {number} prints:\n{output}"


# A laptop's sizes, in addition to what the page says; the checkpoint's own settings do that for `univid encode`.
SMALLER = {
    "univid": "--workers 0",
    "torchrun": "steps=2 log.every=1 streams.video.num_frames=3 streams.video.height=16 streams.video.width=32 streams.video.workers=0",
    "python": "",
}


def test_own_clips_in_three_commands(tmp_path):
    """The page's lines, as they are typed in a clone, on four clips and one that is cut off."""
    start, mine = tmp_path / "path/to/univid", tmp_path / "path/to/mine"
    (tmp_path / "train").symlink_to(ROOT / "train")
    (tmp_path / "clips").mkdir()
    for i in range(5):
        data = video(tmp_path / f"clips/{i}.mp4", 20 * i)
    (tmp_path / "clips/4.mp4").write_bytes(data[:400])
    (tmp_path / "clips/clips.csv").write_text("path,caption\n" + "".join(f"{i}.mp4,clip {i}\n" for i in range(5)))
    make().save_pretrained(start)

    block = (ROOT / "README.md").read_text().partition("in three commands")[2].split("```\n")[1]
    commands = block.replace("\\\n", "").splitlines()
    assert [command.split()[0] for command in commands] == list(SMALLER)
    bin = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    printed = []
    for command, more in zip(commands, SMALLER.values(), strict=True):
        ran = subprocess.run(
            ["bash", "-c", f"{command} {more}"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{command}:\n{ran.stdout}{ran.stderr}"
        printed.append(ran.stdout)
    assert printed[0] == "latents: 4 clips, 1 left out\n"
    assert printed[1].endswith("finished at step 2\n") and "from step 0 to 2" in printed[1]
    assert printed[2] == "path/to/mine: runs/clips/checkpoints/step-00000002\n"
    first, trained = (load_file(each / "unet/diffusion_pytorch_model.safetensors") for each in (start, mine))
    moved = {name for name in first if not torch.equal(first[name], trained[name])}
    assert any("temporal" in name for name in moved) and len(moved) > len(first) / 2
    videos = univid.UniVidPipeline.from_pretrained(mine)("clip 1", progress=False)
    assert videos.frames.shape == (1, 3, 16, 32, 3)


def test_first_example_is_short():
    code = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "from univid.ops import pyramid_st_attn, ReferenceFrames" in code
    assert len([line for line in code.splitlines() if line]) == 5


@pytest.mark.skipif(find_spec("triton") is None, reason="without Triton its kernels cannot be looked at")
def test_operators_table():
    """The README's table has, for every operator, the backends that run it, forward and backward if it has both."""
    rows = re.findall(
        r"^\| `(\w+)`.*\| ([a-z, ]+, reference) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE
    )
    table = {name: backends.split(", ") for name, backends in rows}
    complete = {
        name: [
            b
            for b in ops.BACKENDS
            if all(hasattr(dispatch._load(b, operator.module), direction) for direction in operator.directions)
        ]
        for name, operator in _OPERATORS.items()
        if not name.endswith("_qkv")
    }
    assert table == complete


def test_package_imports_no_torch():
    result = python("-c", "import sys, univid; print(univid.__version__, 'torch' in sys.modules)")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert result.stdout.split() == [version, "False"], result.stderr
    assert univid.__version__ == version


@on_each_device
def test_doctor_passes(gpu):
    result = python("-m", "univid.doctor", gpu=gpu)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^All 12 operators are right \(\d+ s\)\.$", result.stdout, flags=re.MULTILINE)
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_demo_lets_waiting_threads_sleep(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = "import sys, univid; print('torch' in sys.modules); import univid.demo, os; print(os.environ['OMP_WAIT_POLICY'])"
    assert python("-c", code).stdout.split() == ["False", "PASSIVE"]


def test_demo_passes(tmp_path, monkeypatch, capsys):
    """All of it but the doctor, in fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "main", lambda: 0)
    monkeypatch.setattr(demo, "STEPS", 6)
    assert demo.main() == 0
    printed = capsys.readouterr().out
    for name, seen in (("text", "red, star, left"), ("image", ".*"), ("text-and-image", ".*, up")):
        assert re.search(rf"^  demo/{name}\.mp4: 16x64x64 at 8 fps, [0-9.]+ s: {seen}$", printed, flags=re.MULTILINE)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        *("image.mp4", "picture.png", "text-and-image.mp4", "text.mp4"),
    ]


def test_doctor_finds_what_is_wrong(monkeypatch, capsys):
    right = ops.temporal_attn
    monkeypatch.setattr(ops, "temporal_attn", lambda q, k, v: right(q, k, v) * 1.05)
    cases = doctor.cases(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(
        doctor, "cases", lambda *_: [case for case in cases if case.operator.startswith("temporal_attn")]
    )
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert re.search(r"^temporal_attn .* WRONG$", printed, flags=re.MULTILINE)
    assert re.search(r"^temporal_attn_qkv .* ok$", printed, flags=re.MULTILINE)
    assert "1 of 2 operators failed" in printed


def test_doctor_leaves_the_process_as_it_was(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("UNIVID_AUTOTUNE", raising=False)
    torch.set_num_threads(2)
    assert doctor.main() == 0
    assert torch.get_num_threads() == 2 and "UNIVID_AUTOTUNE" not in os.environ
    torch.set_num_threads(1)


def test_doctor_names_what_cannot_run(monkeypatch, capsys):
    monkeypatch.setenv("UNIVID_BACKEND", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "pyramid_st_attn: UNIVID_BACKEND=cuda cannot run its forward: " in printed
    assert "12 of 12 operators failed" in printed
