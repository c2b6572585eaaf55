"""Our training step: the objective and the strategy that a run uses, on synthetic rows."""

import torch

from tools.timing.rows import bias_for, make_rows
from tools.timing.setting import Setting
from trainer.dictionary import GATES, ConceptDictionary, DictionaryConfig
from trainer.kernels import KernelChoice, usable_precision
from trainer.kernels.gradients import gradient_buffer
from trainer.losses import LossWeights
from trainer.objective import AlignObjective
from trainer.optimizer import OptimConfig
from trainer.strategies.local import LocalStrategy
from trainer.sums import SUMS, MicroBatch
from trainer.topology import Topology


class OurStep:
    """Forward, backward, clipping and AdamW of a dictionary; learning rate 0 keeps the density where it was set."""

    def __init__(self, setting: Setting, precision: str = "bf16", kernel: str = "dense"):
        self.setting = setting
        x, concept, answer = make_rows(setting)
        counts = torch.tensor([len(x), (concept >= 0).sum(), (answer >= 0).sum()], dtype=torch.float32, device=x.device)
        self.rows = MicroBatch(x, concept, answer, counts)
        self.topology = Topology(device=torch.device(setting.device))
        names = [f"concept {i}" for i in range(setting.concepts)]
        chosen = DictionaryConfig(setting.slots, setting.bank_slots, gate=setting.gate)
        form = chosen.form(setting.width, names, setting.answers)
        dictionary = ConceptDictionary(form, seed=setting.seed)
        with torch.no_grad():
            dictionary.concepts.W_enc.normal_().mul_(setting.width**-0.5)
            dictionary.concepts.W_dec.normal_().mul_(setting.width**-0.5)
        dictionary.to(setting.device)
        # The gate keeps the number of active slots, so that no sparsity term has to, as in a run.
        self.weights = LossWeights(sp=0.0) if GATES[setting.gate].fixes_l0 else LossWeights()
        precision = usable_precision(precision, self.topology.device)
        self.objective = AlignObjective(dictionary, self.topology, kernel=kernel, precision=precision)
        self.strategy = LocalStrategy(self.topology)
        self.strategy.prepare(self.objective, OptimConfig(), 0)
        self.active = torch.zeros((), device=setting.device)
        self.made = torch.tensor(True, device=setting.device)
        bank = next(iter(dictionary.free_banks()))
        self.sparse_level = -bias_for(x, bank.W_enc[:2048], setting.l0, setting.slots)

    @torch.no_grad()
    def prepare(self, kernel: str, sparse: bool) -> None:
        """Pin all banks to one kernel, at the density of the setting or of initialisation.

        At initialisation the bias is 0 and half of the slots are active. Raises UserError where the kernel cannot run.
        """
        self.objective.choice = KernelChoice(kernel, self.objective.dictionary.form.bank_sizes, self.topology.device)
        level = self.sparse_level if sparse else 0.0  # above which as many pre-activations lie as are to be active
        for bank in self.objective.dictionary.free_banks():
            held = bank.gate.tensors_at(torch.full((bank.slots,), level))
            for name, value in held.items():
                getattr(bank, name).copy_(value)
            bank.b_enc.fill_(0.0 if held else -level)

    def step(self, align: bool) -> None:
        """One optimizer step."""
        loss, sums = self.strategy.forward(self.rows, self.weights, align, 1)
        self.strategy.backward(loss, last=True)
        self.strategy.update(0.0, OptimConfig.clip, self.made)
        self.active = sums[SUMS.index("active")]
        l0 = self.active / len(self.rows.acts)
        # Aiming at where it is: the threshold is followed, and stays where it was set.
        self.objective.take_up(self.made, l0, l0.clamp_min(1e-9) if GATES[self.setting.gate].fixes_l0 else None)

    @property
    def l0(self) -> float:
        """Mean active free slots of a row at the last step."""
        return float(self.active) / len(self.rows.acts)


class FloorAdamW:
    """The floor's pass of AdamW: torch's own fused one, on the weights and moments of our step.

    So there is no second set of them. Gradients and learning rate are 0, so that it leaves the weights as they are.
    """

    def __init__(self, ours: OurStep):
        self.optimizer = ours.strategy.optimizer

    def prepare(self) -> None:
        """Gradients, in the buffers that our step uses too."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = gradient_buffer(parameter).zero_()

    def run(self) -> None:
        """The pass."""
        torch.optim.AdamW.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
