"""A small ChatGPT, built in the open: the package of nanochat, the book.

Every module is exported from a chapter and is edited there, not here:

common       chapters/00_start_here.py  Start here
tinyworld    chapters/A1_tiny_world.py  The tiny world
bpe          chapters/01_tokenizer.py  The tokenizer
tokenizer    chapters/01_tokenizer.py  The tokenizer
data         chapters/02_data.py  Data
model        chapters/03_model.py  The model
optim        chapters/04_optimizer.py  The optimizer
checkpoint   chapters/05_pretraining.py  Pretraining
train        chapters/05_pretraining.py  Pretraining
budget       chapters/05_pretraining.py  Pretraining
convert      chapters/05_pretraining.py  Pretraining
kernels      chapters/A3_fast_kernels.py  Fast kernels
decode       chapters/A6_fast_decoding.py  Fast decoding
distributed  chapters/06_distributed.py  Many processes
evaluation   chapters/07_evaluation.py  Evaluation
core         chapters/07_evaluation.py  Evaluation
sandbox      chapters/08_inference.py  Inference
calculator   chapters/08_inference.py  Inference
engine       chapters/08_inference.py  Inference
chat         chapters/09_chat_finetuning.py  From text to chat
tasks        chapters/09_chat_finetuning.py  From text to chat
finetune     chapters/09_chat_finetuning.py  From text to chat
rl           chapters/10_reinforcement.py  Reinforcement learning
ui           chapters/11_chat_ui.py  Talking to it
serve        chapters/A5_serving.py  Serving it
scaling      chapters/A2_scaling_laws.py  Scaling laws
recipe       chapters/A4_recipe.py  The recipe of a run
report       chapters/A4_recipe.py  The recipe of a run
cli          chapters/A4_recipe.py  The recipe of a run
__main__     chapters/A4_recipe.py  The recipe of a run
"""

__version__ = "0.1.0"
