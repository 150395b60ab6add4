"""`ldmq serve`: quantized pipelines behind OpenAI's images API, with batches that change no picture.

`serving.app.make_app` gives the application, which uvicorn and other servers of ASGI run. Only this sub-package
imports FastAPI.
"""
