"""The names of samplers elsewhere and what they mean here. Run as a script it writes docs/names.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fewstep as fs

PAGE = Path(__file__).parents[2] / "docs" / "names.md"

HEAD = """# The names of other libraries

Every name below that stands for a solver is one here as well: `fewstep.sample(..., solver="dpmpp_2m_sde_heun")`,
`FewStepScheduler.from_config(config, solver="LMSDiscreteScheduler")`, `fewstep explain uni_pc_bh2`. Options are added
as usual and go before those that the name implies: `"uni_pc:order=2"`. `fewstep list solvers --json` has the same map.

`python tests/helpers/names_table.py` writes this page.
"""

K_DIFFUSION_NOTES = {
    "dpm_adaptive": "no spec: how many steps it takes depends on the data; `fewstep.sample_adaptive`",
    "dpm_fast": "its two levels are the ends of the grid, and n its number of steps",
    "dpmpp_3m_sde": "half the weight of the last difference, as there; `variant=exact` has all of it",
}
# sample_* of k_diffusion/sampling.py, without the prefix.
K_DIFFUSION = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
)

CFG_PP = "no spec: CFG++ is guidance, not a solver"
LOG_SIGMA = "on flow models ComfyUI counts in log sigma, the solver here in log(alpha / sigma)"
RF = "on flow models ComfyUI has the noise of `euler_ancestral:frame=flow`, and log sigma as for `dpm_2`"
# SAMPLER_NAMES of comfy/samplers.py, 0.3.64 to 0.38, and what is to know about each.
COMFYUI: dict[str, str] = {
    "euler": "",
    "euler_cfg_pp": CFG_PP,
    "euler_ancestral": "",
    "euler_ancestral_cfg_pp": CFG_PP,
    "heun": "",
    "heunpp2": "",
    "exp_heun_2_x0": "",
    "exp_heun_2_x0_sde": "",
    "dpm_2": LOG_SIGMA,
    "dpm_2_ancestral": RF,
    "lms": "the same numbers on all models: `ipndm:weights=variable`, whose last step is Euler's",
    "dpm_fast": LOG_SIGMA,
    "dpm_adaptive": K_DIFFUSION_NOTES["dpm_adaptive"],
    "dpmpp_2s_ancestral": RF,
    "dpmpp_2s_ancestral_cfg_pp": CFG_PP,
    "dpmpp_sde": "",
    "dpmpp_sde_gpu": "",
    "dpmpp_2m": LOG_SIGMA,
    "dpmpp_2m_cfg_pp": CFG_PP,
    "dpmpp_2m_sde": "",
    "dpmpp_2m_sde_gpu": "",
    "dpmpp_2m_sde_heun": "",
    "dpmpp_2m_sde_heun_gpu": "",
    "dpmpp_3m_sde": "",
    "dpmpp_3m_sde_gpu": "",
    "ddpm": "on flow models ComfyUI's keeps the rule of VP models, which is not one of a flow",
    "lcm": "",
    "ipndm": "",
    "ipndm_v": "the exact weights; ComfyUI's have three slips: `ipndm:weights=published`",
    "deis": "exact and in the model's own time; ComfyUI on diffusion: `deis:variable=vp,riemann=10000,both_ends=true`",
    "res_multistep": LOG_SIGMA,
    "res_multistep_cfg_pp": CFG_PP,
    "res_multistep_ancestral": "on flow models ComfyUI's keeps the rule of EDM models, which is not one of a flow",
    "res_multistep_ancestral_cfg_pp": CFG_PP,
    "gradient_estimation": "",
    "gradient_estimation_cfg_pp": CFG_PP,
    "er_sde": "exact integrals; ComfyUI's are sums: `er_sde:riemann=200`",
    "seeds_2": "",
    "seeds_3": "",
    "sa_solver": "noise at every level; ComfyUI has it from 20 to 80 per cent of the way: `s_min`, `s_max`",
    "sa_solver_pece": "as `sa_solver`",
    "ddim": "ComfyUI's is its euler",
    "uni_pc": "ComfyUI ends at sigma 0.001, and treats a flow model as if it were an EDM one",
    "uni_pc_bh2": "as `uni_pc`",
    "cfgpp_ud10_ab": CFG_PP,
}

DISCRETE = "no spec: discrete tokens, there is nothing to integrate"
INVERSION = "no spec: an inversion, which runs towards noise"
# Classes of diffusers 0.42 and what is to know about each.
DIFFUSERS: dict[str, str] = {
    "AmusedScheduler": DISCRETE,
    "BlockRefinementScheduler": DISCRETE,
    "CMStochasticIterativeScheduler": "levels are sqrt(sigma^2 - sigma_min^2), the network is told sigma",
    "CogVideoXDDIMScheduler": "steps by a stride, as `DDIMScheduler`",
    "CogVideoXDPMScheduler": "draws twice a step and uses the second",
    "ConsistencyDecoderScheduler": "",
    "CosineDPMSolverMultistepScheduler": "",
    "DDIMInverseScheduler": INVERSION,
    "DDIMParallelScheduler": "as `DDIMScheduler`",
    "DDIMScheduler": "steps to t - T // n whatever its list says: `stride`; `final_index` if not `set_alpha_to_one`",
    "DDPMParallelScheduler": "",
    "DDPMScheduler": "learned variances are no part of it",
    "DDPMWuerstchenScheduler": "no noise in the last step, though its last level is not 0",
    "DEISMultistepScheduler": "lowers the last orders below 15 steps only",
    "DPMSolverMultistepInverseScheduler": INVERSION,
    "DPMSolverMultistepScheduler": "`algorithm_type=sde-dpmsolver` has no spec: it is not exact for one data point",
    "DPMSolverSDEScheduler": "",
    "DPMSolverSinglestepScheduler": "`algorithm_type=sde-dpmsolver++` has no spec: `dpmpp_sde`, stages on the grid",
    "DiscreteDDIMScheduler": DISCRETE,
    "EDMDPMSolverMultistepScheduler": "",
    "EDMEulerScheduler": "with churn the class evaluates before it adds the noise",
    "EntropyBoundScheduler": DISCRETE,
    "EulerAncestralDiscreteScheduler": "",
    "EulerDiscreteScheduler": "with churn the class evaluates before it adds the noise",
    "FlowMapEulerDiscreteScheduler": "the network is a flow map, which is told the end of the step as well",
    "FlowMatchEulerDiscreteScheduler": "",
    "FlowMatchHeunDiscreteScheduler": "",
    "FlowMatchLCMScheduler": "",
    "HeliosDMDScheduler": "the noise is given, one tensor for all steps",
    "HeliosScheduler": "inside a stage",
    "HeunDiscreteScheduler": "",
    "IPNDMScheduler": "its first evaluation is not used",
    "KDPM2AncestralDiscreteScheduler": "",
    "KDPM2DiscreteScheduler": "",
    "KarrasVeScheduler": "",
    "LCMScheduler": "",
    "LMSDiscreteScheduler": "",
    "LTXEulerAncestralRFScheduler": "",
    "MiniMaxH3Scheduler": "its time and velocity run backwards",
    "PNDMScheduler": "a v prediction is converted after it has been averaged, with the newest state; here before",
    "PiflowScheduler": "no spec: the network gives a policy that is integrated within a step",
    "RFD4ProteinaScheduler": "no spec: a score at another temperature, and noise of its own on proteins",
    "RePaintScheduler": "no spec: inpainting, which needs the picture",
    "SASolverScheduler": "`tau_func` is 1 from t = 200 to 800: `s_min`, `s_max` at these levels",
    "SCMScheduler": "in units of `sigma_data`",
    "ScoreSdeVeScheduler": "its corrector's step depends on norms of the data",
    "ScoreSdeVpScheduler": "no spec: Euler-Maruyama in t",
    "TCDScheduler": "`eta` of its step is `gamma`",
    "UnCLIPScheduler": "learned variances are no part of it",
    "UniPCMultistepScheduler": "",
    "VQDiffusionScheduler": DISCRETE,
}

KEPT = {"final_sigmas_type": "sigma_min"}
# What options of a class mean, in runs of fewer than 15 steps.
DIFFUSERS_OPTIONS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "dpmpp_2m:solver_type=heun"),
    ("DPMSolverMultistepScheduler", KEPT, "dpmpp_2m:lower_order_final=true"),
    ("DPMSolverMultistepScheduler", {"euler_at_final": True} | KEPT, "dpmpp_2m:lower_order_final=true"),
    ("DPMSolverMultistepScheduler", {"lower_order_final": False} | KEPT, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, "ddim"),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m:lower_order_final=true"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver"} | KEPT,
        "dpmpp_2m:form=epsilon,lower_order_final=true",
    ),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "solver_type": "heun", "lower_order_final": False} | KEPT,
        "dpmpp_2m:form=epsilon,solver_type=heun",
    ),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "solver_order": 3} | KEPT,
        "dpmpp_3m:form=epsilon,lower_order_final=true",
    ),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        "dpmpp_2m_sde:solver_type=heun",
    ),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, "ddim:eta=1"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        "dpmpp_3m_sde:variant=diffusers,lower_order_final=true",
    ),
    ("DPMSolverSinglestepScheduler", {"solver_type": "heun"}, "dpmpp_2s:solver_type=heun"),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1}, "ddim"),
    (
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3},
        "dpmpp_3s:inner=midpoint,lower_order_final=true",
    ),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver"} | KEPT, "dpmpp_2s:form=epsilon"),
    ("UniPCMultistepScheduler", {"solver_order": 1}, "unipc:order=1"),
    ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc:order=3"),
    ("UniPCMultistepScheduler", {"solver_type": "bh1"} | KEPT, "unipc:variant=bh1"),
    ("UniPCMultistepScheduler", {"predict_x0": False} | KEPT, "unipc:form=epsilon"),
    ("UniPCMultistepScheduler", {"disable_corrector": [0, 2]}, "unipc:disable_corrector=0/2"),
    ("UniPCMultistepScheduler", {"lower_order_final": False} | KEPT, "unipc:lower_order_final=false"),
    ("DEISMultistepScheduler", {"solver_order": 1}, "ddim"),
    ("DEISMultistepScheduler", {"solver_order": 3}, "deis:order=3,variable=log_rho,lower_order_final=true"),
    ("DDPMScheduler", {"variance_type": "fixed_large"}, "ddpm:variance=large"),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "cps:eta=1"),
    ("HeliosScheduler", {"scheduler_type": "euler"}, "euler"),
)


def options_of(*names: str) -> list[tuple[str, dict[str, Any], str]]:
    """The rows of some classes."""
    return [row for row in DIFFUSERS_OPTIONS if row[0] in names]


def has_spec(note: str) -> bool:
    return not note.startswith("no spec")


def page() -> str:
    tables = {
        "diffusers": DIFFUSERS,
        "ComfyUI": COMFYUI,
        "k-diffusion": {name: K_DIFFUSION_NOTES.get(name, "") for name in K_DIFFUSION},
    }
    text = HEAD
    for title, names in tables.items():
        text += f"\n## {title}\n\n| name | solver | to know |\n|---|---|---|\n"
        for name, note in names.items():
            text += f"| `{name}` | {f'`{fs.solver(name).spec}`' if has_spec(note) else ''} | {note} |\n"
        if title == "ComfyUI":
            text += COMFYUI_TAIL
        if title == "diffusers":
            text += OPTIONS_HEAD + "".join(
                f"| `{name}` | {', '.join(f'`{k}={v}`' for k, v in options.items())} | `{spec}` |\n"
                for name, options, spec in DIFFUSERS_OPTIONS
            )
    return text


OPTIONS_HEAD = """
A class means the solver of its default options. Clipping, thresholding and re-spaced levels are not the solver's:
`FewStepScheduler` takes them from the config. Where a class rounds timesteps after it has chosen levels (Karras), the
grid holds both. Re-spaced levels of `DEISMultistepScheduler` and `SASolverScheduler`, and theirs on flow models, end
in a step of no length. tests/hosts/test_same_as_diffusers.py compares every class with its solver, to 1e-5 in fp32.

| class | options | solver |
|---|---|---|
"""

COMFYUI_TAIL = """
On diffusion models every name gives ComfyUI's numbers on the same levels but where the table says otherwise; on flow
models too, with the remarks above. KSampler drops the last level but one for dpm_2, dpm_2_ancestral, uni_pc and
uni_pc_bh2, and the samplers that count in log(alpha / sigma) start a flow just below sigma = 1; both are a matter of
the levels, not of the solver.
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
