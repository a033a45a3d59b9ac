"""verl on a CPU, by its own extension points, so that `verl.trainer.main_ppo` runs as it stands: VERL_PLATFORM=cpu.

Registered are a platform (gloo, one logical Ray "GPU" a process), verl's own FSDP engine for it, and, in place of
vLLM's server and the CUDA IPC of its weights, a Ray actor that samples by transformers' `generate` and is sent the
weights. Patched is one name: the backends that verl asks torch.distributed for.
"""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import ray
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

NO_MEMORY = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
DEVICE = SimpleNamespace(
    **dict.fromkeys(NO_MEMORY, lambda *_: 0),
    **dict.fromkeys(("empty_cache", "synchronize", "set_device", "reset_peak_memory_stats"), lambda *_: None),
    mem_get_info=lambda: (0, 0),
    is_available=lambda: False,  # there is no memory to be watched or freed
    current_device=lambda: "cpu",
    get_device_name=lambda: "CPU",
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = DEVICE

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def nvtx_range(self, msg):
        return nullcontext()

    def nothing(self, *_):
        return None

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = cudart = nothing


from transformers import AutoModelForCausalLM  # noqa: E402  # what follows asks for the platform
from verl.workers import engine_workers  # noqa: E402
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead  # noqa: E402
from verl.workers.rollout import base, replica  # noqa: E402

EngineRegistry.register("language_model", ["fsdp", "fsdp2"], "cpu")(FSDPEngineWithLMHead)
# verl asks for "cpu:gloo" and for the same again as the device's.
engine_workers.initialize_global_process_group_ray = partial(
    engine_workers.initialize_global_process_group_ray, backend="gloo"
)


@ray.remote
class Server:
    """One replica: samples one request at a time."""

    def __init__(self, path, response_length):
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.response_length, self.global_steps = response_length, None

    def load(self, weights, global_steps):
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= set(self.model._tied_weights_keys or ())
        self.model.tie_weights()
        self.global_steps = global_steps

    def sleep(self): ...

    def wake_up(self): ...

    @torch.inference_mode()
    def generate(self, request_id, prompt_ids, sampling_params, image_data=None, video_data=None):
        greedy = sampling_params["temperature"] == 0
        chosen = {} if greedy else {"temperature": sampling_params["temperature"], "top_p": sampling_params["top_p"]}
        prompt = torch.tensor([prompt_ids])
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=not greedy,
            top_k=0 if not greedy else None,
            max_new_tokens=self.response_length,
            return_dict_in_generate=True,
            output_logits=True,
            **chosen,
        )
        tokens = out.sequences[0, len(prompt_ids) :]
        scores = torch.cat(out.logits).float() / (1.0 if greedy else sampling_params["temperature"])
        log_probs = scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return replica.TokenOutput(
            token_ids=tokens.tolist(),
            log_probs=log_probs.tolist() if sampling_params["logprobs"] else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )


class Replica(replica.RolloutReplica):
    """Launches a `Server`."""

    async def launch_servers(self):
        self._server_address = f"server-{self.replica_rank}"
        self._server_handle = Server.options(name=self._server_address, num_cpus=0).remote(
            self.model_config.path, self.config.response_length
        )
        self.servers = [self._server_handle]


class Adapter(base.BaseRollout):
    """The trainer's end of a `Server`: every process feeds the replica of its rank."""

    async def resume(self, tags): ...

    async def release(self): ...

    async def update_weights(self, weights, global_steps=None, **_):
        rank = torch.distributed.get_rank()
        whole = {name: tensor.detach().cpu() for name, tensor in weights}
        await ray.get_actor(f"server-{rank}").load.remote(whole, global_steps)


replica.RolloutReplicaRegistry.register("vllm", lambda: Replica)
base._ROLLOUT_REGISTRY["vllm", "async"] = f"{__name__}.Adapter"
