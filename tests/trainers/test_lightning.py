"""Lightning steps by a closure in automatic optimization, through a proxy of the optimizer in manual."""

import lightning
import pytest
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from loops import BATCHES, CHAINS, assert_same, loader, network, optimizer_and_scheduler, plain

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in [
        # Lightning's use of torch
        r"`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
        # its advice on speed and logging
        r"The '(train|val)_dataloader' does not have many workers",
        r"The number of training batches \(8\) is smaller than the logging interval",
    ]
]


class Module(lightning.LightningModule):
    """The network as Lightning's users write it."""

    def __init__(self, chain, manual=False):
        super().__init__()
        self.net = network()
        self.chain = chain
        self.automatic_optimization = not manual

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        scheduler.step()
        return None

    def validation_step(self, batch, _):
        self.net(100 * batch[0])

    def configure_optimizers(self):
        optimizer, scheduler = optimizer_and_scheduler(self, CHAINS[self.chain]())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer(tmp_path, epochs=2, **options):
    settings = {"enable_checkpointing": False, "logger": False, **options}
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )


def fit(tmp_path, chain, manual=False, resume=None, **options):
    """What Lightning makes: the module, its optimizer and its trainer."""
    module, run = Module(chain, manual), trainer(tmp_path, **options)
    run.fit(module, loader(), loader(), ckpt_path=resume, weights_only=True if resume else None)
    return module.net, run.optimizers[0], run


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("chain", CHAINS)
def test_equals_the_plain_loop(tmp_path, chain, manual):
    assert_same(fit(tmp_path, chain, manual)[:2], plain(chain))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_and_clipping_equal_the_plain_loop(tmp_path, accumulate, clip):
    actual = fit(tmp_path, "bnp", accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    assert_same(actual[:2], plain("bnp", accumulate=accumulate, clip=clip))


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("chain", CHAINS)
def test_resumed_from_its_checkpoint_equals_uninterrupted(tmp_path, chain, manual):
    *_, first = fit(tmp_path, chain, manual, epochs=1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = fit(tmp_path, chain, manual, epochs=2, resume=tmp_path / "one.ckpt")
    uninterrupted = fit(tmp_path, chain, manual, epochs=2)
    assert_same(resumed[:2], uninterrupted[:2], rtol=0, atol=0)


def test_the_proxy_of_manual_optimization_has_the_whole_surface(tmp_path):
    net, optimizer, run = fit(tmp_path, "bnp", manual=True)
    proxy = run.lightning_module.optimizers()
    assert proxy is not optimizer
    assert "net.0" in proxy.report().conditioned
    assert proxy.conditioners is optimizer.conditioners
    assert proxy.param_groups is optimizer.optimizer.param_groups
    assert proxy.preconditioner().shape == optimizer.preconditioner().shape
    proxy.load_state_dict(proxy.state_dict())
    assert_same((net, optimizer), plain("bnp"))


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_callbacks_that_look_into_the_optimizer(tmp_path):
    """One reads the rates, the other copies the module and swaps the scheduler."""
    monitor, logger = LearningRateMonitor("step"), CSVLogger(tmp_path)
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
    callbacks = [monitor, averaging]
    _, optimizer, _ = fit(tmp_path, "bnp", epochs=3, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    assert optimizer._engine.states[0]["net.0"]["steps"] == 3 * BATCHES
