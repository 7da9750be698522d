// The gradient check itself; testing.h says what it promises.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <torch/csrc/autograd/autograd.h>

#include "tensors.h"
#include "types.h"

namespace torchmoe::testing::detail {

class Gradcheck {
 public:
  // With `every_output`, an output that needs no gradient counts as constant; otherwise it is
  // taken as not differentiable and skipped, as long as another one is differentiable.
  Gradcheck(const TensorFunction& function,
            const Tensors& inputs,
            const GradcheckOptions& options,
            bool every_output)
      : function_(function), inputs_(inputs), options_(options), every_output_(every_output) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      const at::Tensor& x = inputs[i];
      if (!x.defined() || !x.requires_grad()) {
        continue;
      }
      TORCH_CHECK(x.scalar_type() == at::kDouble && x.is_leaf(),
                  "gradcheck: inputs[",
                  i,
                  "] must be a float64 leaf, got ",
                  x.scalar_type(),
                  x.is_leaf() ? "" : " computed from other tensors");
      TORCH_CHECK(at::has_internal_overlap(x) != at::MemOverlap::Yes,
                  "gradcheck: inputs[",
                  i,
                  "] must have its own memory for every entry, got strides ",
                  x.strides());
      variables_.push_back(i);
    }
    TORCH_CHECK(!variables_.empty(),
                "gradcheck: inputs must hold one that requires grad, got none");
  }

  void run() {
    const Run base = forward(variables_);
    find_differentiable_outputs(base);
    const auto numeric = numeric_jacobians(base.outputs);
    check(base, variables_, numeric, "all inputs together");
    if (variables_.size() == 1) {
      return;
    }
    for (size_t v = 0; v < variables_.size(); ++v) {
      const std::vector<size_t> alone = {variables_[v]};
      check(forward(alone), alone, {numeric[v]}, "that input alone");
    }
  }

 private:
  struct Run {
    Tensors inputs, before, outputs;  // `before`: the inputs as they were given
  };
  struct Step {
    size_t input;
    int64_t entry;
    double size;
  };
  using Jacobians = std::vector<Tensors>;  // per variable, per output: [output numel, input numel]

  Run forward(const std::vector<size_t>& variables, const Step* step = nullptr) const {
    Run run;
    for (const at::Tensor& x : inputs_) {
      run.inputs.push_back(copy_of(x));
    }
    if (step != nullptr) {
      entry_at(run.inputs[step->input], step->entry).add_(step->size);
    }
    run.before = snapshot(run.inputs);
    for (size_t v : variables) {
      run.inputs[v].requires_grad_();
    }
    run.outputs = function_(run.inputs);
    check_unmodified(run, "forward");
    return run;
  }

  // A forward pass with other values overwrites what a function keeps outside its context. Half of
  // a value is usually as valid as the value; if it is not, nothing is lost.
  void forward_elsewhere() const {
    Tensors inputs;
    for (const at::Tensor& x : inputs_) {
      inputs.push_back(copy_of(x));
    }
    for (size_t v : variables_) {
      inputs[v].mul_(0.5).requires_grad_();
    }
    try {
      function_(inputs);
    } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): see above
    }
  }

  void find_differentiable_outputs(const Run& base) {
    const Tensors& outputs = base.outputs;
    bool any = false;
    for (const at::Tensor& y : outputs) {
      any |= y.defined() && y.requires_grad();
    }
    for (size_t o = 0; o < outputs.size(); ++o) {
      const at::Tensor& y = outputs[o];
      const bool skipped = any && !every_output_ && y.defined() && !y.requires_grad();
      if (!y.defined() || !y.is_floating_point() || skipped) {
        continue;
      }
      if (y.scalar_type() != at::kDouble) {
        fault("output ", o, " must be float64, got ", y.scalar_type());
      }
      chosen_.push_back(o);
    }
    at::NoGradGuard no_grad;
    const Tensors again = forward({}).outputs;
    for (size_t o : chosen_) {
      if (o >= again.size() || !same_bits(again[o], outputs[o])) {
        fault("output ",
              o,
              " must be the same in every run and with gradients off, got another value for the "
              "same inputs; random numbers belong into the inputs");
      }
    }
    if (options_.selection) {
      selected_ = selection_at(base.inputs);
    }
  }

  Jacobians numeric_jacobians(const Tensors& base) const {
    at::NoGradGuard no_grad;
    Jacobians jacobians;
    for (size_t v : variables_) {
      const int64_t entries = inputs_[v].numel();
      jacobians.emplace_back();
      for (size_t o : chosen_) {
        jacobians.back().push_back(at::empty({base[o].numel(), entries}, base[o].options()));
      }
      for (int64_t i = 0; i < entries; ++i) {
        const Step up{v, i, options_.eps}, down{v, i, -options_.eps};
        const Run above = stepped(up), below = stepped(down);
        // The actual floating-point step, which differs from 2 eps for large entries.
        const double width =
            (entry_at(above.inputs[v], i) - entry_at(below.inputs[v], i)).item<double>();
        for (size_t c = 0; c < chosen_.size(); ++c) {
          const size_t o = chosen_[c];
          const at::Tensor change = above.outputs.at(o).sub(below.outputs.at(o));
          jacobians.back()[c].select(1, i).copy_(change.div(width).reshape({-1}));
        }
      }
    }
    return jacobians;
  }

  Run stepped(const Step& step) const {
    const Run run = forward({}, &step);
    if (!options_.selection) {
      return run;
    }
    const at::Tensor now = selection_at(run.inputs);
    if (same_bits(now, selected_)) {
      return run;
    }
    const auto where = entry_of(step.entry, inputs_[step.input].sizes());
    int64_t row = 0;
    const bool rows = now.dim() > 0 && now.sizes() == selected_.sizes();
    while (rows && same_bits(now[row], selected_[row])) {
      ++row;
    }
    fault("the selection must not change within eps, got another one for token ",
          row,
          " when input ",
          step.input,
          " at ",
          at::IntArrayRef(where),
          " moved by ",
          step.size,
          "; move the inputs away from ties");
  }

  void check(const Run& run,
             const std::vector<size_t>& variables,
             const Jacobians& numeric,
             const char* mode) const {
    forward_elsewhere();
    for (size_t c = 0; c < chosen_.size(); ++c) {
      const at::Tensor analytic = analytic_jacobian(run, variables, chosen_[c]);
      int64_t column = 0;
      for (size_t v = 0; v < variables.size(); ++v) {
        const int64_t entries = inputs_[variables[v]].numel();
        compare(analytic.narrow(1, column, entries),
                numeric[v][c],
                chosen_[c],
                run.outputs[chosen_[c]].sizes(),
                variables[v],
                mode);
        column += entries;
      }
    }
    check_backward(run, variables, mode);
  }

  at::Tensor analytic_jacobian(const Run& run,
                               const std::vector<size_t>& variables,
                               size_t output) const {
    const at::Tensor& y = run.outputs[output];
    Tensors rows;
    for (int64_t j = 0; j < y.numel(); ++j) {
      at::Tensor unit = at::zeros(y.sizes(), y.options());
      unit.view({-1}).select(0, j).fill_(1);
      rows.push_back(backward(run, variables, {y}, {unit}));
    }
    if (!rows.empty()) {
      return at::stack(rows);
    }
    int64_t entries = 0;
    for (size_t v : variables) {
      entries += inputs_[v].numel();
    }
    return at::empty({0, entries}, y.options());
  }

  // The gradients of `variables`, flattened and one after the other; zero where there is none.
  at::Tensor backward(const Run& run,
                      const std::vector<size_t>& variables,
                      const Tensors& outputs,
                      const Tensors& cotangents) const {
    Tensors leaves, from, with;
    for (size_t v : variables) {
      leaves.push_back(run.inputs[v]);
    }
    for (size_t o = 0; o < outputs.size(); ++o) {
      if (!outputs[o].requires_grad()) {
        continue;
      }
      from.push_back(outputs[o]);
      with.push_back(cotangents[o]);
    }
    Tensors grads(leaves.size());
    if (!from.empty()) {
      const Tensors before = snapshot(with);
      grads = torch::autograd::grad(from,
                                    leaves,
                                    with,
                                    /*retain_graph=*/true,
                                    /*create_graph=*/false,
                                    /*allow_unused=*/true);
      for (size_t o = 0; o < with.size(); ++o) {
        if (!same_bits(with[o], before[o])) {
          fault("backward must not write to the gradient it is given, got one that changed");
        }
      }
      check_unmodified(run, "backward");
    }
    Tensors flat;
    for (size_t i = 0; i < leaves.size(); ++i) {
      flat.push_back(grads[i].defined() ? grads[i].reshape({-1})
                                        : at::zeros({leaves[i].numel()}, leaves[i].options()));
    }
    return at::cat(flat).detach();
  }

  // What a backward must keep besides its values, on one weighting of all outputs.
  void check_backward(const Run& run,
                      const std::vector<size_t>& variables,
                      const char* mode) const {
    Tensors outputs, cotangents, gapped;
    for (size_t o : chosen_) {
      outputs.push_back(run.outputs[o]);
      cotangents.push_back(cotangent_of(run.outputs[o]));
      gapped.push_back(with_gaps(cotangents.back()));
    }
    const at::Tensor grads = backward(run, variables, outputs, cotangents);
    if (!same_bits(grads, backward(run, variables, outputs, cotangents))) {
      fault("backward must give the same bits when repeated, got another gradient with ", mode);
    }
    if (!close(grads, backward(run, variables, outputs, gapped))) {
      fault(
          "backward must take an incoming gradient of any strides, got another gradient for a "
          "strided one with ",
          mode);
    }
    for (size_t c = 0; c <= outputs.size(); ++c) {  // each output alone, then all of them
      Tensors cut = outputs, zeros = cotangents;
      for (size_t o = 0; o < outputs.size(); ++o) {
        if ((c != o && c != outputs.size()) || !outputs[o].requires_grad()) {
          continue;
        }
        cut[o] = UndefinedGradient::apply(outputs[o]);
        zeros[o] = at::zeros_like(cotangents[o]);
      }
      std::string said = "another gradient than for zeros";
      try {
        if (close(backward(run, variables, outputs, zeros),
                  backward(run, variables, cut, cotangents))) {
          continue;
        }
      } catch (const std::exception& error) {
        said = error.what();
      }
      fault(
          "backward must take an undefined incoming gradient as zero, got with ", mode, ": ", said);
    }
  }

  bool close(const at::Tensor& a, const at::Tensor& b) const {
    return at::allclose(a, b, options_.rtol, options_.atol, /*equal_nan=*/true);
  }

  void compare(const at::Tensor& analytic,
               const at::Tensor& numeric,
               size_t output,
               at::IntArrayRef output_sizes,
               size_t input,
               const char* mode) const {
    // NaN compares false, so that it never passes.
    const at::Tensor error = (analytic - numeric).abs();
    const at::Tensor wrong = error.le(options_.atol + options_.rtol * numeric.abs()).logical_not_();
    const int64_t count = wrong.sum().item<int64_t>();
    if (count == 0) {
      return;
    }
    const int64_t worst =
        at::where(wrong, error, at::full_like(error, -1)).reshape({-1}).argmax().item<int64_t>();
    const int64_t columns = numeric.size(1);
    const auto row = entry_of(worst / columns, output_sizes);
    const auto column = entry_of(worst % columns, inputs_[input].sizes());
    fault("the derivative of output ",
          output,
          " at ",
          at::IntArrayRef(row),
          " in input ",
          input,
          " at ",
          at::IntArrayRef(column),
          " must be ",
          numeric.reshape({-1})[worst].item<double>(),
          " (numeric), got ",
          analytic.reshape({-1})[worst].item<double>(),
          " (analytic) with ",
          mode,
          "; ",
          count,
          " of ",
          wrong.numel(),
          " entries differ");
  }

  at::Tensor selection_at(const Tensors& inputs) const {
    at::NoGradGuard no_grad;
    const at::Tensor selected = options_.selection(inputs);
    TORCH_CHECK(at::isIntegralType(selected.scalar_type(), /*includeBool=*/true),
                "gradcheck: selection must return integers, got ",
                selected.scalar_type());
    return selected.clone();
  }

  static void check_unmodified(const Run& run, const char* pass) {
    at::NoGradGuard no_grad;
    for (size_t i = 0; i < run.inputs.size(); ++i) {
      if (same_bits(run.inputs[i], run.before[i])) {
        continue;
      }
      fault(pass, " must not modify its inputs, got input ", i, " changed");
    }
  }

  TensorFunction function_;
  Tensors inputs_;
  GradcheckOptions options_;
  bool every_output_;
  std::vector<size_t> variables_;  // the inputs that require grad
  std::vector<size_t> chosen_;     // the differentiable outputs
  at::Tensor selected_;
};

inline GradcheckResult run_gradcheck(const std::string& name,
                                     const TensorFunction& function,
                                     const Tensors& inputs,
                                     const GradcheckOptions& options,
                                     bool every_output) {
  try {
    Gradcheck(function, inputs, options, every_output).run();
  } catch (const Fault& found) {
    return {false, name + ": " + found.message};
  }
  return {};
}

}  // namespace torchmoe::testing::detail
