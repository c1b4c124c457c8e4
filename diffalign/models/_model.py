"""One text-to-image model as everything above sees it: a denoiser with its schedule, prompts, pixels and adapter.

The class is the same for every family; what differs is data in `Family` (see the family files).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diffalign.models import _adapter, _user_branch, _user_files
from diffalign.models._attention import set_attention
from diffalign.models._config import Lora, ModelConfig
from diffalign.models._fingerprint import fingerprint
from diffalign.models._load import DTYPES, find_folder, load_pipeline
from diffalign.models._quiet import CutPrompts, no_warnings
from diffalign.models._user_branch import UserBranch
from diffalign.models._user_encoder import UserSpec
from diffalign.schedule import schedule_from_config
from diffalign.types import Schedule, UserError

__all__ = ["Lora", "Model", "ModelConfig"]

PARTS = ("vae", "text", "denoiser")


class Model:
    """A loaded pipeline whose denoiser can be trained. Follows the `Policy` protocol.

    `denoiser` is what `__call__` runs: a launcher may replace it by a wrapped one (DDP); `network` stays the bare one.
    """

    denoiser: nn.Module

    def __init__(self, config: ModelConfig, device: str = "cpu") -> None:
        self.config = config
        self.family = type(config).family
        self.name = type(config).__module__.rpartition(".")[2]
        self._folder, self._temporary = find_folder(config)
        self.pipeline: Any = load_pipeline(self._folder, config)
        self.network: Any = getattr(self.pipeline, self.family.denoiser)
        self.schedule: Schedule = schedule_from_config(self.pipeline.scheduler.config)
        self.vae_factor = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        self.latent_channels: int = self.network.config.in_channels
        self.resolution: tuple[int, int] = self._resolution()
        self.dtype: torch.dtype = next(self.network.parameters()).dtype  # of the denoiser's base weights
        self._cut_prompts = CutPrompts(self.pipeline, getattr(config, "max_sequence_length", 0))
        self._parked: list[nn.Module] = []  # in main memory between the calls that need them
        self._adapter_scale: dict[str, float] = {}  # of adapters loaded for generation
        self._prepare_training()
        self.denoiser = self.network
        self.to(device)
        if config.compile == "blocks":
            self.network._repeated_blocks = list(self.family.repeated_blocks)
            self.network.compile_repeated_blocks()

    def _resolution(self) -> tuple[int, int]:
        given, size = self.config.resolution, self.network.config.sample_size
        if given is None:
            height, width = (size, size) if isinstance(size, int) else size
            return height * self.vae_factor, width * self.vae_factor
        height, width = (given, given) if isinstance(given, int) else given
        step = self.vae_factor * self.family.patch_size
        if height % step or width % step:
            raise UserError(f"model.resolution={height}x{width}: both sides must be multiples of {step}")
        return height, width

    def _prepare_training(self) -> None:
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        if self.config.trainable == "lora":
            _adapter.add(self.pipeline, self.config.lora, self.family)
        else:
            self.network.requires_grad_(self.config.trainable == "full")
        if self.config.users is not None:
            self._add_branch(UserBranch(self.network, self.family.user_attention, self.config.users.token_width))
        if self.config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing(self.users.checkpointed if self.users else None)
            self.network.train()  # diffusers checkpoints in train mode only; these networks hold no batch norm
        self._scan_adapters()

    def _scan_adapters(self) -> None:
        self._layers = _adapter.tuner_layers(self.network)
        self._dropouts = [m for layer in self._layers for m in layer.modules() if isinstance(m, nn.Dropout) and m.p]
        if self.users is not None:
            self.users.attach(self.network)

    # Users

    @property
    def users(self) -> UserBranch | None:
        """The user branch, where the model has one."""
        return getattr(self.network, _user_branch.NAME, None)

    def _add_branch(self, branch: UserBranch) -> None:
        if self.users is not None:
            self.users.detach()
        self.network.add_module(_user_branch.NAME, branch)

    def set_users(
        self,
        *,
        names: Sequence[str] = (),
        embedding_width: int = 0,
        feature_width: int = 0,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Builds what turns users into vectors, which depends on the data: see `UserSpec` for the arguments.

        Call it before the trainable parameters are asked for; a second call starts anew.
        """
        config = self.config.users
        assert self.users is not None and config is not None, "model.users is not configured"
        width = embedding_width if config.by == "embedding" else config.width
        features = config.features if config.by == "pairs" else ""
        spec = UserSpec(
            config.by, width, config.num_tokens, config.token_width, tuple(names), features, feature_width, scale
        )
        self.users.set_users(spec, seed)

    # Where things are

    @property
    def device(self) -> torch.device:
        """Of the denoiser."""
        return next(self.network.parameters()).device

    def to(self, device: str | torch.device) -> Model:
        """Moves the denoiser, and the encoders unless they were offloaded; chooses the attention kernel anew.

        Raises:
            UserError: `model.attention` names a kernel that does not work there.
        """
        self.network.to(device)
        for module in self._encoders():
            if module not in self._parked:
                module.to(device)
        set_attention(self.network, self.config.attention, self.device, DTYPES[self.config.dtype])
        return self

    def offload_encoders(self, keep_vae: bool = False) -> None:
        """Parks text encoders and VAE in main memory; each comes back only for the calls that need it.

        `keep_vae` leaves the VAE where it is, for runs that decode all the time.
        """
        self._parked = [*self._text_encoders(), *([] if keep_vae else [self.pipeline.vae])]
        for module in self._parked:
            module.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encoders(self) -> list[nn.Module]:
        return [*self._text_encoders(), self.pipeline.vae]

    def _text_encoders(self) -> list[nn.Module]:
        parts = self.pipeline.components.items()
        return [m for name, m in parts if name.startswith("text_encoder") and isinstance(m, nn.Module)]

    @contextlib.contextmanager
    def _present(self, modules: list[nn.Module]) -> Iterator[None]:
        """The modules on the denoiser's device, afterwards back where offloading put them."""
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules:
                if module in self._parked:
                    module.to("cpu")

    # The denoiser

    def __call__(self, xt: Float[Tensor, "N C H W"], t: Float[Tensor, " N"], cond: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction [N C H W] in the family's native target; `t` in [0, 1], 1 is noise.

        Inputs are cast to the weights' dtype; autocast, and float32 for what is computed from the result, are the
        caller's. LoRA dropout is active exactly where gradients are.
        """
        for dropout in self._dropouts:
            dropout.train(torch.is_grad_enabled())
        with contextlib.nullcontext() if self.users is None else self.users.fed(cond):
            return self.family.forward(self.denoiser, xt.to(self.dtype), self.schedule.network_time(t), cond)

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base model for the duration, bit for bit: without adapter and without users.

        Raises:
            UserError: the full weights are trained, so that the base model is gone.
        """
        if self.config.trainable == "full":
            raise UserError("model.trainable=full has no adapter to switch off: set reference.name=frozen")
        with contextlib.nullcontext() if self.users is None else self.users.switched_off():
            with _adapter.switched_off(self._layers):
                yield

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of that size in pixels."""
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

    # Prompts and pixels

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Rows [n, ...] on the CPU in the encoders' dtype, equal to what the diffusers pipeline computes."""
        with torch.no_grad(), self._present(self._text_encoders()), no_warnings():
            self._cut_prompts.count(prompts)
            cond = self.family.encode(self.pipeline, list(prompts), self.config)
            return {name: value.cpu() for name, value in cond.items()}

    def empty_prompt(self) -> dict[str, Tensor]:
        """Rows [1, ...]: what inference takes as unconditional, and what prompt dropout must therefore use."""
        with torch.no_grad(), self._present(self._text_encoders()):
            return {name: value.cpu() for name, value in self.family.empty(self.pipeline, self.config).items()}

    def size_cond(
        self, original: Int64[Tensor, "n 2"], crop: Int64[Tensor, "n 2"], target: Int64[Tensor, "n 2"]
    ) -> dict[str, Tensor]:
        """The image size as conditioning, float32 rows [n, ...]; (height, width) and (top, left) in pixels."""
        return self.family.size_cond(original, crop, target)

    @torch.no_grad()
    def encode_images(self, pixels: Float[Tensor, "n 3 H W"]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n C h w] of the posterior in scaled latent space, float32 on the CPU.

        `pixels` lie in [-1, 1]; scaled means (z - shift) * scale, what the denoiser sees.
        """
        vae = self.pipeline.vae
        with self._present([vae]):
            posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
            scale, shift = self._latent_scale()
            mean = (posterior.mean.float() - shift) * scale
            return mean.cpu(), (posterior.std.float() * scale).cpu()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n C h w"]) -> Float[Tensor, "n 3 H W"]:
        """Pixels in [0, 1], float32 on the CPU, of scaled latents."""
        vae = self.pipeline.vae
        with self._present([vae]):
            scale, shift = self._latent_scale()
            z = latents.to(self.device, torch.float32) / scale + shift
            pixels = vae.decode(z.to(vae.dtype), return_dict=False)[0]
            return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _latent_scale(self) -> tuple[float, float]:
        settings = self.pipeline.vae.config
        return settings.scaling_factor, getattr(settings, "shift_factor", None) or 0.0

    # Weights

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> float32 parameter that the optimizer updates."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def state_dict_trainable(self) -> dict[str, Tensor]:
        """The trainable parameters, detached, sharing memory."""
        return {name: parameter.detach() for name, parameter in self.trainable_parameters().items()}

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Copies values in place, so that optimizers keep their parameters.

        Raises:
            UserError: names or shapes of another model or adapter.
        """
        parameters = self.trainable_parameters()
        odd = sorted(set(state) ^ set(parameters))
        if odd:
            raise UserError(f"the weights are of another model or adapter: {odd[0]!r} is on one side only")
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                shapes = f"{tuple(state[name].shape)} instead of {tuple(parameter.shape)}"
                raise UserError(f"the weights are of another model or adapter: {name!r} is {shapes}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])

    def fingerprint(self, part: Literal["vae", "text", "denoiser"]) -> str:
        """Content hash of the files a part was loaded from and of the settings that change what it computes.

        Of the files, not of memory: training does not change it, and a cache keyed by it survives a resume.
        """
        assert part in PARTS, part
        if part == "vae":
            return self._hash(("vae",), dtype=self.config.vae_dtype)
        if part == "denoiser":
            return self._hash((self.family.denoiser, "scheduler"), dtype=str(self.dtype))
        settings = {key: getattr(self.config, key) for key in self.family.text_settings}
        settings["zeros_for_empty_prompt"] = self.pipeline.config.get("force_zeros_for_empty_prompt", False)
        return self._hash(("text_encoder", "tokenizer"), dtype=self.config.dtype, **settings)

    def _hash(self, prefixes: tuple[str, ...], **settings: Any) -> str:
        return fingerprint(self._folder, prefixes, self.config.variant, settings)

    def export(self, folder: str | Path, format: Literal["diffusers", "kohya"] = "diffusers") -> Path:
        """Writes what was trained: a LoRA folder for `load_lora_weights`, or the whole pipeline; a user branch beside.

        Raises:
            UserError: `kohya` (webui key names) for full weights, or for a family or adapter it cannot hold.
        """
        folder = Path(folder)
        if format not in ("diffusers", "kohya"):
            raise UserError(f"export.format={format}: legal are diffusers and kohya")
        if self.users is not None:
            if format == "kohya":
                raise UserError("export.format=kohya holds no user branch; use format=diffusers")
            _user_files.export(self.users, self.family, folder)
        if self.config.trainable == "users":
            return folder
        if self.config.trainable == "lora":
            write = _adapter.export if format == "diffusers" else _adapter.export_kohya
            write(self.pipeline, self.family, folder)
        elif format == "kohya":
            raise UserError("export.format=kohya is for LoRA; full weights are exported as a diffusers pipeline")
        elif self._layers:
            raise UserError("an adapter was loaded on top of the full weights: export before load_adapter")
        else:
            branch = self.network._modules.pop(_user_branch.NAME, None)  # has a file of its own
            self.pipeline.save_pretrained(folder, safe_serialization=True)
            if branch is not None:
                self.network.add_module(_user_branch.NAME, branch)
        return folder

    def load_adapter(self, path: str | Path, scale: float = 1.0) -> None:
        """Adds an exported LoRA, frozen, on top of what is there, for generation. `adapter_off` covers it too.

        A user branch in the folder takes the place of the model's; a folder may hold one and no LoRA.

        Raises:
            UserError: no adapter there, or one of another model.
        """
        path = Path(path).expanduser()
        branch = _user_files.find(path)
        if branch is not None:
            self._add_branch(_user_files.load(self.network, self.family, branch, scale))
            self._scan_adapters()
            if not (path / _adapter.FILE).is_file():
                return
        trained = {id(parameter) for parameter in self.trainable_parameters().values()}
        earlier = list(getattr(self.network, "peft_config", {}))
        weights = {name: self._adapter_scale.get(name, 1.0) for name in earlier}
        name = f"loaded_{len(earlier)}"
        _adapter.load(self.pipeline, self.family, path, name, "adapter")
        self._adapter_scale[name] = scale
        self.network.set_adapters([*weights, name], [*weights.values(), scale])
        for parameter in self.network.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self._scan_adapters()

    def adapter_stats(self) -> dict[str, float]:
        """`num_tensors`, `num_targets`, `num_targets_covered` (update not zero) and `norm` of the trained adapter.

        Raises:
            UserError: no adapter is trained.
        """
        if self.config.trainable != "lora":
            raise UserError("adapter statistics are for model.trainable=lora")
        return _adapter.stats(self.network)
