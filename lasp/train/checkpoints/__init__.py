"""Checkpoints: one folder per step, complete from the moment it has its name.

checkpoints/step-000150/
    state/rank-0.safetensors, …      what training changes, each rank's part; index.json says which part lies where. A
                                     large part of few ranks is several files (rank-0-1.safetensors, …), which are
                                     compared with their checksums side by side
    config.json, tokenizer.json, …   the model's configuration and the tokenizer, as transformers reads them
    model.safetensors                the whole model, as `from_pretrained` reads it, in the last checkpoint of a run; of
                                     others `lasp export` makes it. Adapters as peft has them
    run.json                         the configuration of the run, which one that continues it is compared with
    manifest.json                    the step, and size and SHA-256 of every other file

Reading one runs nothing of it: there is JSON, and safetensors.
"""
