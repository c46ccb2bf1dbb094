"""Names of bitsandbytes that kbit deliberately does not have, each with what to use instead."""

from __future__ import annotations

from kbit.integrations.bitsandbytes.identity import AbsentLibrary

_TORCH_INT8 = "use int8_linear_matmul on the codes of int8_vectorwise_quant"
_TABLES = "use quantize_blockwise and dequantize_blockwise with a code"
_PAGES = "paged state belongs to kbit.optim (PagedAdamW and the like); nothing is paged by hand"
_LAYOUT = "int8 codes are always stored row by row, so there is nothing to transform"
_OPTIM = "use the classes of bitsandbytes.optim, whose step updates every tensor in one launch"
_CPU = "kbit's CPU kernels read the stored layout, so weights are never laid out again"
_CUBLAS = "kbit calls no cuBLAS handle of its own; " + _TORCH_INT8

FUNCTIONAL = {
    "CUBLAS_Context": _CUBLAS,
    "Cusparse_Context": _CUBLAS,
    "GlobalPageManager": _PAGES,
    "get_paged": _PAGES,
    "prefetch_tensor": _PAGES,
    "elementwise_func": "use torch's own operators on the tensor",
    "fill": "use tensor.fill_(value)",
    "arange": "use torch.arange",
    "_mul": "use torch.mul",
    "_convert_weight_packed_for_cpu": _CPU,
    "_convert_weight_packed_for_cpu_inverse": _CPU,
    "optimizer_update_32bit": _OPTIM,
    "optimizer_update_8bit": _OPTIM,
    "optimizer_update_8bit_blockwise": _OPTIM,
    "check_matmul": "torch.matmul checks shapes itself",
    "igemm": _TORCH_INT8,
    "batched_igemm": _TORCH_INT8,
    "igemmlt": _TORCH_INT8,
    "vectorwise_mm_dequant": "use int8_mm_dequant",
    "mm_dequant": "use int8_mm_dequant",
    "vectorwise_quant": "use int8_vectorwise_quant",
    "vectorwise_dequant": "use int8_vectorwise_dequant",
    "double_quant": "use int8_double_quant, or int8_vectorwise_quant for inference",
    "get_colrow_absmax": "use int8_vectorwise_quant, which returns the row absmax",
    "transform": _LAYOUT,
    "nvidia_transform": _LAYOUT,
    "get_transform_func": _LAYOUT,
    "get_transform_buffer": _LAYOUT,
    "extract_outliers": "index the columns that int8_vectorwise_quant returns as outliers",
    "quantize": _TABLES,
    "dequantize": _TABLES,
    "quantize_no_absmax": _TABLES,
    "dequantize_no_absmax": _TABLES,
    "estimate_quantiles": "use torch.quantile",
    "create_quantile_map": "use torch.quantile and pass the result as code",
    "histogram_scatter_add_2d": "use torch.Tensor.index_put_ with accumulate=True",
    "percentile_clipping": "use torch.nn.utils.clip_grad_norm_",
    "COOSparseTensor": "use torch.sparse_coo_tensor",
    "coo_zeros": "use torch.sparse_coo_tensor",
    "spmm_coo": "use torch.sparse.mm",
    "spmm_coo_very_sparse": "use torch.sparse.mm",
}

_RESEARCH = "bitsandbytes removed it in 0.50"
RESEARCH = {
    name: f"{_RESEARCH}; use kbit.nn.SwitchBackLinear to train floating point weights with int8 products"
    for name in (
        "LinearFP8Mixed",
        "LinearFP8Global",
        "matmul_fp8_mixed",
        "matmul_fp8_global",
        "switchback_bnb",
        "nn",
        "autograd",
    )
}

MODULES = {
    name: f"{_RESEARCH}; use kbit.nn.SwitchBackLinear to train, Linear8bitLt for inference"
    for name in (
        "SwitchBackLinear",
        "SwitchBackLinearBnb",
        "SwitchBackLinearGlobal",
        "SwitchBackLinearVectorwise",
        "StandardLinear",
        "OutlierAwareLinear",
    )
}
MODULES |= {"FP4Params": "it is called Params4bit", "maybe_rearrange_weight": _LAYOUT}
OPTIMIZER = {"MockArgs": "pass the settings as keywords"}
UTILS = {"outlier_hook": "call OutlierTracer.get_instance().initialize(model), which registers it"}
AUTOGRAD = {
    "GlobalOutlierPooler": "outlier columns are found in every product and pooled nowhere",
    "MatMul4Bit": "use bitsandbytes.matmul_4bit",
    "MatMul8bit": "use bitsandbytes.matmul",
    "MatMul8bitFp": "use bitsandbytes.matmul",
    "MatMul8bitLt": "use bitsandbytes.matmul",
    "bmm_cublas": "use torch.bmm",
    "matmul_cublas": "use torch.matmul",
    "mm_cublas": "use torch.mm",
    "get_inverse_transform_indices": _LAYOUT,
    "undo_layout": _LAYOUT,
    "supports_igemmlt": "every device can multiply int8 codes here",
}
CEXTENSION = {
    name: "kbit compiles its kernels when they are first used; `kbit doctor` says which serve this machine"
    for name in ("get_native_library", "get_cuda_bnb_library_path", "CudaBNBNativeLibrary", "BNBNativeLibrary")
}

NATIVE_LIBRARY = AbsentLibrary(
    "bitsandbytes.functional.lib",
    "kbit has no compiled bitsandbytes library; call quantize_4bit, dequantize_4bit, quantize_blockwise, "
    "dequantize_blockwise or matmul_4bit of bitsandbytes.functional, or torch.ops.kbit",
)
