# From a particle stack to volumes: one rule a stage, one command a rule.
#   snakemake --profile cluster/local --configfile mine.yaml
if not workflow.configfiles:

    configfile: "workflow/config/default.yaml"


include: "workflow/rules/common.smk"


if CONFIG.simulate is not None:

    include: "workflow/rules/simulate.smk"


include: "workflow/rules/preflight.smk"
include: "workflow/rules/preprocess.smk"
include: "workflow/rules/consensus.smk"
include: "workflow/rules/discover.smk"
include: "workflow/rules/parts.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/reconstruct.smk"
include: "workflow/rules/analyse.smk"
include: "workflow/rules/assemble.smk"


if TRUTH is not None:

    include: "workflow/rules/evaluate.smk"


if CONFIG.halves:

    include: "workflow/rules/validate.smk"


include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        R / "report.html",
