// A part of a graph that keeps only its inputs and is recomputed in the backward pass.
#include "shim.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

using at::Tensor;
using List = std::vector<Tensor>;
using torch::autograd::Node;
using torch::autograd::SavedVariable;

extern "C" const char* ddil_last_error() noexcept;

namespace {

// A Rust function. `call` appends one tensor to `outputs`, or returns a number other than 0 and sets the reason for
// `ddil_last_error`; it may be called from any thread. `release` is called once.
class Function {
 public:
  using Call = int (*)(void* function, const List* inputs, List* outputs);
  using Release = void (*)(void* function);

  Function(void* function, Call call, Release release) : function_(function, release), call_(call) {}

  Tensor operator()(const List& inputs) const {
    List outputs;
    const int code = call_(function_.get(), &inputs, &outputs);
    TORCH_CHECK(code == 0, ddil_last_error());
    TORCH_CHECK(outputs.size() == 1, "the function returned ", outputs.size(), " tensors, not one");
    return std::move(outputs.front());
  }

 private:
  std::shared_ptr<void> function_;
  Call call_;
};

// Autocast state of the thread of the forward pass; threads of the backward pass do not have it.
class Autocasting {
 public:
  static Autocasting here() {
    Autocasting state;
    for (size_t i = 0; i < DEVICES.size(); ++i) {
      state.enabled_[i] = at::autocast::is_autocast_enabled(DEVICES[i]);
      state.kinds_[i] = at::autocast::get_autocast_dtype(DEVICES[i]);
    }
    state.cached_ = at::autocast::is_autocast_cache_enabled();
    return state;
  }

  void put_on() const {
    for (size_t i = 0; i < DEVICES.size(); ++i) {
      at::autocast::set_autocast_dtype(DEVICES[i], kinds_[i]);
      at::autocast::set_autocast_enabled(DEVICES[i], enabled_[i]);
    }
    at::autocast::set_autocast_cache_enabled(cached_);
  }

 private:
  static constexpr std::array<at::DeviceType, 2> DEVICES{at::kCPU, at::kCUDA};
  std::array<bool, 2> enabled_{};
  std::array<at::ScalarType, 2> kinds_{};
  bool cached_ = false;
};

class AutocastGuard {
 public:
  explicit AutocastGuard(const Autocasting& state) : before_(Autocasting::here()) {
    state.put_on();
    at::autocast::increment_nesting();
  }
  ~AutocastGuard() {
    // The cached casts belong to the graph of this part only.
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    before_.put_on();
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  Autocasting before_;
};

// States of libtorch's default generators, on the CPU and on the inputs' device.
class RandomStates {
 public:
  RandomStates() = default;
  explicit RandomStates(const List& inputs) {
    add(at::kCPU);
    for (const Tensor& input : inputs) {
      if (input.is_cuda()) add(input.device());
    }
  }

  RandomStates now() const {
    RandomStates states;
    for (const auto& [device, state] : states_) states.add(device);
    return states;
  }

  void put_on() const {
    for (const auto& [device, state] : states_) {
      at::Generator generator = at::globalContext().defaultGenerator(device);
      std::lock_guard<std::mutex> lock(generator.mutex());
      generator.set_state(state);
    }
  }

  // Whether nothing was drawn since; states are bytes on the CPU for every device.
  bool stand_still() const {
    const RandomStates present = now();
    for (size_t i = 0; i < states_.size(); ++i) {
      const Tensor &before = states_[i].second, &after = present.states_[i].second;
      if (before.nbytes() != after.nbytes()) return false;
      if (std::memcmp(before.const_data_ptr(), after.const_data_ptr(), before.nbytes()) != 0) return false;
    }
    return true;
  }

  bool empty() const { return states_.empty(); }

 private:
  void add(const at::Device& device) {
    for (const auto& [known, state] : states_) {
      if (known == device) return;
    }
    at::Generator generator = at::globalContext().defaultGenerator(device);
    std::lock_guard<std::mutex> lock(generator.mutex());
    states_.emplace_back(device, generator.get_state());
  }

  std::vector<std::pair<at::Device, Tensor>> states_;
};

// Repeats the draws from these states, and restores the current ones afterwards.
class RandomGuard {
 public:
  explicit RandomGuard(const RandomStates& states) : before_(states.now()) { states.put_on(); }
  ~RandomGuard() { before_.put_on(); }
  RandomGuard(const RandomGuard&) = delete;
  RandomGuard& operator=(const RandomGuard&) = delete;

 private:
  RandomStates before_;
};

// The same values as leaves of a new graph.
List cut_off(const List& inputs) {
  List own;
  own.reserve(inputs.size());
  for (const Tensor& input : inputs) {
    own.push_back(input.requires_grad() ? input.detach().set_requires_grad(true) : input);
  }
  return own;
}

// The tensors with gradients that the function reads beside its inputs: parameters.
List captured_leaves(const Tensor& output, const List& inputs) {
  std::unordered_set<const at::TensorImpl*> own;
  for (const Tensor& input : inputs) own.insert(input.unsafeGetTensorImpl());
  std::unordered_set<const Node*> seen;
  std::vector<Node*> open{torch::autograd::impl::gradient_edge(output).function.get()};
  List leaves;
  while (!open.empty()) {
    Node* node = open.back();
    open.pop_back();
    if (node == nullptr || !seen.insert(node).second) continue;
    if (auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
      if (own.count(leaf->variable.unsafeGetTensorImpl()) == 0) leaves.push_back(leaf->variable);
    }
    for (const auto& edge : node->next_edges()) open.push_back(edge.function.get());
  }
  return leaves;
}

// The state needed to recompute a part.
struct Recipe {
  Function function;
  std::vector<SavedVariable> inputs;
  std::vector<SavedVariable> leaves;
  Autocasting autocasting;
  // Empty if nothing was drawn.
  RandomStates states;
};

List unpacked(const std::vector<SavedVariable>& saved) {
  List tensors;
  tensors.reserve(saved.size());
  // Fails if one was changed in place since.
  for (const SavedVariable& variable : saved) tensors.push_back(variable.unpack());
  return tensors;
}

Tensor compute_again(const Recipe& recipe, const List& inputs) {
  at::AutoGradMode with_gradients(true);
  AutocastGuard autocast(recipe.autocasting);
  if (recipe.states.empty()) return recipe.function(inputs);
  RandomGuard random(recipe.states);
  return recipe.function(inputs);
}

struct Recomputed final : Node {
  explicit Recomputed(std::shared_ptr<const Recipe> recipe) : recipe_(std::move(recipe)) {}

  std::string name() const override { return "RecomputedBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    recipe_.reset();
  }

 protected:
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    torch::autograd::variable_list all(num_outputs());
    if (!grads[0].defined()) return all;
    TORCH_CHECK(!at::GradMode::is_enabled(), "recomputed parts do not support second derivatives");
    const auto recipe = held();
    List sources = cut_off(unpacked(recipe->inputs));
    const Tensor output = compute_again(*recipe, sources);
    for (Tensor& leaf : unpacked(recipe->leaves)) sources.push_back(std::move(leaf));

    List wanted;
    std::vector<size_t> places;
    for (size_t i = 0; i < sources.size(); ++i) {
      if (!sources[i].requires_grad() || !task_should_compute_output(i)) continue;
      wanted.push_back(sources[i]);
      places.push_back(i);
    }
    if (wanted.empty()) return all;
    auto found = torch::autograd::grad(
        {output}, wanted, {std::move(grads[0])}, /*retain_graph=*/false, /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < found.size(); ++i) all[places[i]] = std::move(found[i]);
    return all;
  }

 private:
  std::shared_ptr<const Recipe> held() {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(recipe_ != nullptr, torch::autograd::ERR_BACKWARD_TWICE);
    return recipe_;
  }

  std::shared_ptr<const Recipe> recipe_;
};

std::vector<SavedVariable> saved(const List& tensors) {
  std::vector<SavedVariable> saved;
  saved.reserve(tensors.size());
  for (const Tensor& tensor : tensors) saved.emplace_back(tensor, /*is_output=*/false);
  return saved;
}

Tensor recomputed(Function function, const List& inputs) {
  if (!at::GradMode::is_enabled()) return function(inputs);
  // Before the call: a function that changes its inputs in place is detected when they are unpacked.
  auto kept = saved(inputs);
  const List own = cut_off(inputs);
  RandomStates states(inputs);
  // With gradients, although its graph is dropped at once: the graph shows which parameters are read, and the casts that
  // autocast caches for the rest of the pass need one.
  const Tensor output = function(own);
  if (!output.requires_grad()) return output;
  if (states.stand_still()) states = RandomStates();
  const List leaves = captured_leaves(output, own);
  auto recipe = std::make_shared<const Recipe>(
      Recipe{std::move(function), std::move(kept), saved(leaves), Autocasting::here(), std::move(states)});
  auto node = c10::make_intrusive<Recomputed>(std::move(recipe));
  for (const List* list : {&inputs, &leaves}) {
    for (const Tensor& tensor : *list) node->add_next_edge(torch::autograd::impl::gradient_edge(tensor));
  }
  Tensor result = output.tensor_data();
  torch::autograd::set_history(result, node);
  return result;
}

}  // namespace

DDIL_EXPORT int ddil_recomputed(
    const List* inputs, void* function, Function::Call call, Function::Release release, Tensor** out) noexcept {
  return ddil::guarded([&] { *out = new Tensor(recomputed(Function(function, call, release), *inputs)); });
}

// The reason of a Rust function's failure.
DDIL_EXPORT void ddil_set_last_error(const char* message) noexcept { ddil::set_last_error(message); }
