#include "serialize/unpickle.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <iterator>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/serialization/pickler_helper.h>

#include "serialize/pickle_value.h"

namespace torchmoe {

namespace pickle {
namespace {

using torch::jit::PickleOpCode;

constexpr std::array storage_dtypes{at::kDouble,
                                    at::kFloat,
                                    at::kHalf,
                                    at::kBFloat16,
                                    at::kLong,
                                    at::kInt,
                                    at::kShort,
                                    at::kChar,
                                    at::kByte,
                                    at::kBool};

// TensorIterator takes no more either.
constexpr size_t most_dimensions = 64;

constexpr Global ordered_dict{"collections", "OrderedDict"};
constexpr Global rebuild_tensor{"torch._utils", "_rebuild_tensor_v2"};
constexpr Global rebuild_parameter{"torch._utils", "_rebuild_parameter"};
// Of a parameter, and of another tensor, to which Python code has given attributes.
constexpr Global rebuild_parameter_with_state{"torch._utils", "_rebuild_parameter_with_state"};
constexpr Global rebuild_from_type{"torch._tensor", "_rebuild_from_type_v2"};
constexpr Global tensor_type{"torch", "Tensor"};

class PickleReader {
 public:
  PickleReader(std::string_view program,
               const std::function<at::Storage(std::string_view)>& storage)
      : program_(program), storage_(storage) {}

  StateDict read() {
    while (true) {
      const auto code = static_cast<PickleOpCode>(number(1));
      if (code == PickleOpCode::STOP) {
        return result(pop());
      }
      step(code);
    }
  }

 private:
  static StateDict result(const Value& value) {
    const auto* dict = std::get_if<Dict>(&value);
    TORCH_CHECK_VALUE(dict, "it holds ", value.kind(), ", not a dict of tensors");
    StateDict state;
    for (size_t i = 0; i < dict->items->size(); i += 2) {
      const auto& key = (*dict->items)[i];
      const auto& item = (*dict->items)[i + 1];
      const auto* name = std::get_if<std::string_view>(&key);
      TORCH_CHECK_VALUE(name, "it has a key that is ", key.kind(), ", not a str");
      const auto* tensor = std::get_if<at::Tensor>(&item);
      TORCH_CHECK_VALUE(tensor, "\"", *name, "\" in it is ", item.kind(), ", not a tensor");
      std::string text(*name);
      TORCH_CHECK_VALUE(!state.contains(text), "it has \"", text, "\" twice");
      state.insert(std::move(text), at::Tensor(*tensor));
    }
    return state;
  }

  void step(PickleOpCode code) {
    using enum PickleOpCode;
    switch (code) {
      case PROTO:
        bytes(1);
        break;
      case FRAME:
        bytes(8);
        break;
      case MARK:
        push(Mark{});
        break;
      case NONE:
        push(None{});
        break;
      case NEWTRUE:
      case NEWFALSE:
        push(code == NEWTRUE);
        break;
      case BININT1:
      case BININT2:
        push(static_cast<int64_t>(number(code == BININT1 ? 1 : 2)));
        break;
      case BININT:
      case LONG1:
        push(signed_number(code == BININT ? 4 : number(1)));
        break;
      case BINFLOAT:
        bytes(8);
        push(Float{});
        break;
      case SHORT_BINUNICODE:
        push(bytes(number(1)));
        break;
      case BINUNICODE:
      case BINUNICODE8:
        push(bytes(number(code == BINUNICODE ? 4 : 8)));
        break;
      case EMPTY_TUPLE:
        push(Tuple{container({})});
        break;
      case TUPLE1:
      case TUPLE2:
      case TUPLE3:
        push(Tuple{container(take(code == TUPLE1 ? 1 : code == TUPLE2 ? 2 : 3))});
        break;
      case TUPLE:
        push(Tuple{container(take_to_mark())});
        break;
      case EMPTY_LIST:
        push(List{});
        break;
      case APPEND:
      case APPENDS:
        code == APPEND ? take(1) : take_to_mark();
        top().as<List>();
        break;
      case EMPTY_DICT:
        push(Dict{container({})});
        break;
      case SETITEM:
      case SETITEMS:
        set_items(code == SETITEM ? take(2) : take_to_mark());
        break;
      case BUILD:  // an OrderedDict's attributes: _metadata, which no tensor needs
        pop();
        top().as<Dict>();
        break;
      case BINGET:
      case LONG_BINGET:
        get(number(code == BINGET ? 1 : 4));
        break;
      case BINPUT:
      case LONG_BINPUT:
        put(number(code == BINPUT ? 1 : 4));
        break;
      case MEMOIZE:
        put(memo_.size());
        break;
      case GLOBAL: {
        const auto module = line();
        push(known({module, line()}));
        break;
      }
      case STACK_GLOBAL: {
        const auto names = take(2);
        push(known({names[0].as<std::string_view>(), names[1].as<std::string_view>()}));
        break;
      }
      case BINPERSID:
        push(storage(pop()));
        break;
      case REDUCE: {
        const auto call = take(2);
        push(result_of(call[0].as<Global>(), call[1]));
        break;
      }
      default:
        TORCH_CHECK_VALUE(false,
                          "its pickle has the opcode ",
                          static_cast<int>(static_cast<uint8_t>(code)),
                          ", which is not supported");
    }
  }

  // ---- The program's bytes ----

  std::string_view bytes(uint64_t count) {
    TORCH_CHECK_VALUE(count <= program_.size() - at_, "its pickle ends early");
    const auto found = program_.substr(at_, count);
    at_ += count;
    return found;
  }

  std::string_view line() {
    const auto length = program_.substr(at_).find('\n');
    TORCH_CHECK_VALUE(length != std::string_view::npos, "its pickle ends early");
    const auto found = bytes(length);
    bytes(1);
    return found;
  }

  uint64_t number(size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, bytes(size).data(), size);
    return value;
  }

  int64_t signed_number(uint64_t size) {
    TORCH_CHECK_VALUE(size <= 8, "its pickle has an int beyond 64 bits");
    const auto value = number(size);
    const auto unused = static_cast<unsigned>(64 - 8 * size);
    return size == 0 ? 0 : static_cast<int64_t>(value << unused) >> unused;
  }

  // ---- Stack and memo ----

  void push(Value value) { stack_.push_back(std::move(value)); }

  Value& top() {
    TORCH_CHECK_VALUE(!stack_.empty(), "its pickle takes more than it has");
    return stack_.back();
  }

  Value pop() {
    auto value = std::move(top());
    stack_.pop_back();
    return value;
  }

  Values take(size_t count) {
    TORCH_CHECK_VALUE(count <= stack_.size(), "its pickle takes more than it has");
    const auto first = stack_.end() - static_cast<std::ptrdiff_t>(count);
    Values values(std::make_move_iterator(first), std::make_move_iterator(stack_.end()));
    stack_.erase(first, stack_.end());
    return values;
  }

  Values take_to_mark() {
    const auto mark = std::find_if(stack_.rbegin(), stack_.rend(), [](const Value& value) {
      return std::holds_alternative<Mark>(value);
    });
    auto values = take(static_cast<size_t>(mark - stack_.rbegin()));
    pop();
    return values;
  }

  Values* container(Values values) { return &containers_.emplace_back(std::move(values)); }

  void set_items(const Values& items) {
    auto& all = *top().as<Dict>().items;
    TORCH_CHECK_VALUE(items.size() % 2 == 0, "its pickle has a key without a value");
    all.insert(all.end(), items.begin(), items.end());
  }

  void get(uint64_t place) {
    const auto found = memo_.find(place);
    TORCH_CHECK_VALUE(found != memo_.end(), "its pickle takes more than it has");
    push(found->second);
  }

  void put(uint64_t place) { memo_.insert_or_assign(place, top()); }

  // ---- What the names mean ----

  static Global known(const Global& global) {
    const bool is_known = global == ordered_dict || global == rebuild_tensor ||
                          global == rebuild_parameter || global == rebuild_parameter_with_state ||
                          global == rebuild_from_type || global == tensor_type ||
                          storage_dtype(global) != at::ScalarType::Undefined;
    TORCH_CHECK_VALUE(
        is_known, "it needs ", global.module, ".", global.name, ", which is not supported");
    return global;
  }

  static at::ScalarType storage_dtype(const Global& global) {
    for (const auto dtype : storage_dtypes) {
      if (global.module == "torch" && global.name == c10::str(dtype, "Storage")) {
        return dtype;
      }
    }
    return at::ScalarType::Undefined;
  }

  // The argument at `place` of those that a tuple holds.
  template <typename T>
  static const T& argument(const Value& arguments, size_t place) {
    const auto& all = *arguments.as<Tuple>().items;
    TORCH_CHECK_VALUE(place < all.size(), "its pickle has a tuple that is too short");
    return all[place].as<T>();
  }

  // The id is ("storage", class, key, device, number of entries).
  TypedStorage storage(const Value& id) {
    const auto dtype = storage_dtype(argument<Global>(id, 1));
    TORCH_CHECK_VALUE(dtype != at::ScalarType::Undefined, "its pickle has a storage of no dtype");
    const auto key = argument<std::string_view>(id, 2);
    const auto numel = argument<int64_t>(id, 4);
    TypedStorage result{storage_(key), dtype};
    const auto size = static_cast<int64_t>(c10::elementSize(dtype));
    const auto found = static_cast<int64_t>(result.bytes.nbytes());
    TORCH_CHECK_VALUE(found % size == 0 && found / size == numel,
                      "its record data/",
                      key,
                      " has ",
                      found,
                      " bytes for ",
                      numel,
                      " entries of ",
                      size);
    return result;
  }

  Value result_of(const Global& function, const Value& arguments) {
    if (function == ordered_dict) {
      TORCH_CHECK_VALUE(arguments.as<Tuple>().items->empty(),
                        "its pickle has an OrderedDict of protocol 0 or 1");
      return Dict{container({})};
    }
    if (function == rebuild_parameter || function == rebuild_parameter_with_state) {
      return argument<at::Tensor>(arguments, 0);
    }
    if (function == rebuild_from_type) {
      TORCH_CHECK_VALUE(argument<Global>(arguments, 0) == rebuild_tensor &&
                            argument<Global>(arguments, 1) == tensor_type,
                        "its pickle has a tensor of a class of its own");
      return tensor(argument<Tuple>(arguments, 2));
    }
    TORCH_CHECK_VALUE(
        function == rebuild_tensor, "its pickle calls ", function.module, ".", function.name);
    return tensor(arguments);
  }

  static std::vector<int64_t> integers(const Value& arguments, size_t place) {
    std::vector<int64_t> values;
    for (const auto& item : *argument<Tuple>(arguments, place).items) {
      values.push_back(item.as<int64_t>());
      TORCH_CHECK_VALUE(values.back() >= 0 && values.size() <= most_dimensions,
                        "its pickle has a tensor of negative sizes or too many");
    }
    return values;
  }

  // The arguments are storage, offset, sizes, strides, requires_grad, hooks, and metadata only
  // where the entries are to be negated.
  static at::Tensor tensor(const Value& arguments) {
    TORCH_CHECK_VALUE(arguments.as<Tuple>().items->size() == 6,
                      "its pickle has a tensor with metadata");
    const auto& storage = argument<TypedStorage>(arguments, 0);
    const auto offset = argument<int64_t>(arguments, 1);
    const auto sizes = integers(arguments, 2);
    const auto strides = integers(arguments, 3);
    TORCH_CHECK_VALUE(offset >= 0 && sizes.size() == strides.size(),
                      "its pickle has a tensor whose sizes and strides do not match");
    // One past the tensor's last entry, counted from the storage's first.
    int64_t end = offset;
    int64_t numel = 1;
    bool overflow = __builtin_add_overflow(end, 1, &end);
    for (size_t i = 0; i < sizes.size(); ++i) {
      int64_t span = 0;
      overflow |= __builtin_mul_overflow(std::max<int64_t>(sizes[i], 1) - 1, strides[i], &span);
      overflow |= __builtin_add_overflow(end, span, &end);
      overflow |= __builtin_mul_overflow(numel, sizes[i], &numel);
    }
    const auto size = static_cast<int64_t>(c10::elementSize(storage.dtype));
    const auto room = static_cast<int64_t>(storage.bytes.nbytes()) / size;
    TORCH_CHECK_VALUE(!overflow && (numel == 0 || end <= room),
                      "its pickle has a tensor that leaves its storage");
    auto result = at::empty({0}, at::TensorOptions(storage.dtype));
    result.set_(storage.bytes, offset, sizes, strides);
    return result;
  }

  std::string_view program_;
  size_t at_ = 0;
  const std::function<at::Storage(std::string_view)>& storage_;
  Values stack_;
  std::unordered_map<uint64_t, Value> memo_;
  std::deque<Values> containers_;
};

}  // namespace
}  // namespace pickle

StateDict unpickle_state_dict(std::string_view program,
                              const std::function<at::Storage(std::string_view)>& storage) {
  return pickle::PickleReader(program, storage).read();
}

}  // namespace torchmoe
