// The op schemas (one place, whatever the device) and the pybind11 module that loads them.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "kernels/cpu/kernels.h"
#include "kernels/limits.h"

STABLE_TORCH_LIBRARY(saferclip_fast, m) {
  m.def(
      "nearest_safe(Tensor query, Tensor bank, int k, Tensor? packed=None) "
      "-> (Tensor scores, Tensor indices)");
  m.def("pack_bank(Tensor bank) -> Tensor");
  m.def(
      "retarget_loss(Tensor text, Tensor image, Tensor frozen_text, Tensor frozen_image, "
      "Tensor bank_text, Tensor bank_image, Tensor neighbors, Tensor neighbor_weights, "
      "Tensor row_weights, float[] weights, float beta, float margin, bool current_negative, "
      "bool need_grad) -> (Tensor loss, Tensor terms, Tensor grad_text, Tensor grad_image)");
  m.def(
      "preservation_loss(Tensor text, Tensor image, Tensor frozen_text, Tensor frozen_image, "
      "float[] weights, float logit_scale, bool need_grad, float logits_mib=256.) "
      "-> (Tensor loss, Tensor terms, Tensor grad_text, Tensor grad_image)");
  m.def(
      "info_nce_sums(Tensor x, Tensor y, Tensor? mask, int first, float logit_scale, bool keep) "
      "-> (Tensor rows, Tensor columns, Tensor logits)");
  m.def(
      "info_nce_loss(Tensor x, Tensor y, Tensor? mask, Tensor rows, Tensor columns, Tensor logits, int first, "
      "float logit_scale, bool need_grad) -> (Tensor loss, Tensor grad)");
  m.def(
      "neighbor_hinge(Tensor x, Tensor rows, Tensor indices, Tensor scores, Tensor row_weights, float margin, int k, "
      "bool need_grad) -> (Tensor loss, Tensor values, Tensor grad)");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of saferclip_fast; importing it registers torch.ops.saferclip_fast.*";
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;  // "Clang ..."
#elif defined(__GNUC__)
  m.attr("compiler") = "GCC " __VERSION__;
#else
  m.attr("compiler") = "an unnamed compiler";
#endif
#ifdef SAFERCLIP_CUDA_VERSION
  m.attr("cuda_version") = SAFERCLIP_CUDA_VERSION;  // of the statically linked runtime
  m.attr("cuda_architectures") = SAFERCLIP_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_version") = pybind11::none();
  m.attr("cuda_architectures") = pybind11::none();
#endif
  m.attr("max_neighbors") = saferclip::kMaxNeighbors;
  m.def(
      "cpu_isas",
      [] {
        pybind11::list names;
        for (const auto* table : saferclip::cpu::usable_kernels()) names.append(table->name);
        return names;
      },
      "Instruction sets of the CPU kernels that this CPU runs, best first; SAFERCLIP_FAST_ISA picks one.");
}
