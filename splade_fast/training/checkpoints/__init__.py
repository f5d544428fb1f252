"""Checkpoints of a training run: complete or absent, and free of pickles.

A folder `checkpoint-<step>` holds the encoder as its `save_pretrained` writes it, a separate query
encoder in `query/`, and these files:

- `training_state.safetensors`: tensors that the encoders' files lack, such as the negative cache;
- `optimizer.safetensors`: states of the optimizer, the schedule and the loss scaler;
- `rank-<rank>-of-<ranks>.safetensors`: random number generators and buffers of each process;
- `trainer_state.json`: step, log and similar values, as transformers writes them;
- `checkpoint.json`: the size of every file. It is written last; then the folder gets its name.
"""
