"""The page that shows what quantization did to a model, and the measurements that only the page needs."""
