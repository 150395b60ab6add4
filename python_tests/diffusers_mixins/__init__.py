"""diffusers' own tests, of models and of quantization, run on quantized models.

The tests are not in diffusers' packages: a checkout has them.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers
    python -m python_tests.diffusers_mixins diffusers/tests
    python -m python_tests.diffusers_mixins diffusers/tests --model flux --model unet_2d_condition
"""
