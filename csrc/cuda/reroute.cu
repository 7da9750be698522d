#include "cuda/reroute.h"

#include "common/float_types.h"
#include "cuda/candidate.h"
#include "cuda/lane_groups.h"
#include "cuda/warp.h"

// One block serves the slots in chunks of about its size, and gives every slot what it would get if
// the slots were served one after another.
//
// THE RULE. A slot has a list of experts: the one it asks for (its wish), then the backup of that,
// then all experts by score. When its turn comes it takes the first that is available to it; it is
// dropped where there is none. Its wish is available while it has room; another expert x is not if
//
//     (a) x is full,
//     (b) another slot of the token asked for x, or
//     (c) an earlier slot of the token was rerouted to x.
//
// This is the op's definition: (b) and (c) together name every expert that the token's slots hold
// or wait for. They also name the wish of a slot that was itself rerouted or dropped, but that one
// was full then, and stays full.
//
// A CHUNK. Every slot proposes to an expert, first to its wish, all slots at once. An expert x with
// `room` places left turns a slot down if
//
//     (1) an earlier slot of the chunk that is rerouted too and of the same token proposes to x, or
//     (2) `room` earlier slots, of those that (1) leaves, propose to x. full_from[x] is then one
//         past the position of the last of these `room`.
//
// A slot that is turned down proposes to the first of its list that its wishes (b), the present
// proposals of earlier rerouted slots of its token and full_from leave it. This goes on until no
// slot is turned down.
//
// IT GIVES WHAT THE RULE GIVES. Throughout, whatever comes before a slot's proposal in its list is
// not available to the slot at its turn:
//
//   - x is full from full_from[x] on. Take one of the `room` slots that propose to x before there.
//     What comes before x in its list is not available to it, so that it takes x, unless x is not
//     available either: because x is full by then, which is all we want, or because of (c), and then
//     an earlier slot of its token takes x. So at least `room` slots take x before full_from[x]: no
//     two of them are the same one, since (1) leaves one rerouted slot of a token at x, and (b)
//     none where a slot of the token asks for x.
//   - If an earlier slot j of i's token, rerouted too, proposes to x, then either j takes x, and x
//     is not available to i by (c); or x is not available to j, for being full, and then it is full
//     for i, or by (c), and then (c) holds for i as well. This remains true after j has moved on.
//
// So nothing that the rule gives is ever turned down. Where no slot is turned down any more, every
// slot's proposal is available to it, if those before it take what they propose to: by induction
// over the positions all do.
//
// IT ENDS. Consider the first slot whose proposal is not what the rule gives, when everybody has
// proposed. All before it propose what they take. So its proposal is turned down, and everything
// that is not available to it shows in full_from and in its token's proposals: it now proposes what
// the rule gives. Each round therefore settles at least one more slot.
//
// That slot was wrong for one of two reasons. An expert had filled up at a slot of the chunk that
// was itself not settled a round before: each expert fills once. Or it wanted what a slot of its
// token in another warp had just moved to: within a warp slots propose one after another, each
// knowing the ones before. So there are no more rounds than chunks, experts and moves of the second
// kind together; and there are none of that kind where a token's slots follow one another, as a
// warp then serves whole tokens (of up to 32 slots).

namespace torchmoe::cuda {

namespace {

static_assert(kRerouteWarps == kWarpSize);

/// The slots of a chunk that a warp serves: whole tokens, where the slots lie by token.
int slots_of_warp(int64_t top_k) {
  return top_k > kWarpSize ? kWarpSize : static_cast<int>(kWarpSize / top_k * top_k);
}

/// Whether predicate holds for any thread. A barrier on the way in and out.
__device__ bool block_any(bool predicate) {
  __shared__ bool of_warps[kRerouteWarps];
  const bool of_warp = __any_sync(kAllLanes, predicate);
  __syncthreads();  // threads may still read an earlier call's
  if (lane_id() == 0) {
    of_warps[warp_in_block()] = of_warp;
  }
  __syncthreads();
  return __any_sync(kAllLanes, of_warps[lane_id()]);
}

/// The chunk in work: positions begin .. begin + 32 * slots_of_warp.
struct Chunk {
  int64_t begin;
  int slots_of_warp;
  /// For each place in the chunk, where its slot proposes to go instead of its wish, else -1.
  int64_t* rerouted_to;

  __device__ int64_t begin_of_warp() const {
    return begin + static_cast<int64_t>(warp_in_block()) * slots_of_warp;
  }
};

/// A thread's slot; -1 for all where it has none, for an expert where there is none.
struct Slot {
  int64_t position;
  int64_t slot;
  int64_t token;
  int64_t wish;
  int64_t proposal;

  __device__ bool is_rerouted() const { return proposal >= 0 && proposal != wish; }
};

template <typename T>
__device__ int64_t slot_at(const Rerouting<T>& r, int64_t position) {
  return r.serving == nullptr ? position : r.serving[position];
}

template <typename T>
__device__ Slot slot_of_thread(const Rerouting<T>& r, const Chunk& chunk) {
  const int64_t position = chunk.begin_of_warp() + lane_id();
  if (lane_id() >= chunk.slots_of_warp || position >= r.sizes.num_slots()) {
    return {-1, -1, -1, -1, -1};
  }
  const int64_t slot = slot_at(r, position);
  return {position, slot, slot / r.sizes.top_k, r.limited[slot], r.limited[slot]};
}

/// Where the slot proposes to go instead of its wish, if it stands in the chunk from `begin` to
/// before `end`, else -1.
template <typename T>
__device__ int64_t
rerouted_to(const Rerouting<T>& r, const Chunk& chunk, int64_t slot, int64_t end) {
  const int64_t position = r.positions == nullptr ? slot : r.positions[slot];
  return position >= chunk.begin && position < end ? chunk.rerouted_to[position - chunk.begin] : -1;
}

/// Rejection (1).
template <typename T>
__device__ bool token_has(const Rerouting<T>& r, const Chunk& chunk, const Slot& mine) {
  const int64_t first = mine.token * r.sizes.top_k;
  for (int64_t slot = first; slot < first + r.sizes.top_k; ++slot) {
    if (rerouted_to(r, chunk, slot, mine.position) == mine.proposal) {
      return true;
    }
  }
  return false;
}

/// The next proposal of the slot of `lane`, in every lane; `stamp` is one that no mark has yet.
/// mine.proposal is up to date in the lanes before.
template <typename T>
__device__ int64_t next_proposal(
    const Rerouting<T>& r, const Chunk& chunk, const Slot& mine, int lane, int64_t stamp) {
  using Acc = at::opmath_type<T>;
  const int64_t top_k = r.sizes.top_k;
  const int64_t position = __shfl_sync(kAllLanes, mine.position, lane);
  const int64_t token = __shfl_sync(kAllLanes, mine.token, lane);
  const int64_t wish = __shfl_sync(kAllLanes, mine.wish, lane);
  int64_t* marks = r.scratch.marks + warp_in_block() * r.num_experts;
  const auto mark = [&](int64_t expert) {
    if (expert >= 0) {
      marks[expert] = stamp;
    }
  };
  for (int64_t slot = token * top_k + lane_id(); slot < (token + 1) * top_k; slot += kWarpSize) {
    mark(r.limited[slot]);
    mark(rerouted_to(r, chunk, slot, chunk.begin_of_warp()));
  }
  if (lane_id() < lane && mine.token == token) {
    mark(mine.proposal);
  }
  __syncwarp();
  const auto is_available = [&](int64_t expert) {
    return position < r.scratch.full_from[expert] && marks[expert] != stamp;
  };
  const int64_t backup = r.backup == nullptr ? -1 : r.backup[wish];
  int64_t next = -1;
  if (backup >= 0 && backup < r.num_experts && is_available(backup)) {
    next = backup;
  } else {
    const int64_t row = token * r.num_experts;
    auto best = Candidate<Acc>::none();
    for (int64_t e = lane_id(); e < r.num_experts; e += kWarpSize) {
      const Candidate<Acc> candidate{{static_cast<Acc>(r.scores[row + e]),
                                      r.tie_break == nullptr ? Acc(0) : r.tie_break[row + e]},
                                     e};
      if (is_available(e) && comes_before(candidate, best)) {
        best = candidate;
      }
    }
    best = first_of_warp(best);
    next = best.exists() ? best.expert : -1;
  }
  __syncwarp();  // lanes may still read marks
  return next;
}

/// The slots of the warp that were turned down propose again, one after the other, and so do those
/// that this turns down by (1).
template <typename T>
__device__ void propose(
    const Rerouting<T>& r, const Chunk& chunk, Slot& mine, bool is_turned_down, int64_t& stamp) {
  for (;;) {
    const unsigned left = __ballot_sync(kAllLanes, is_turned_down);
    if (left == 0) {
      return;
    }
    const int lane = __ffs(static_cast<int>(left)) - 1;
    const int64_t token = __shfl_sync(kAllLanes, mine.token, lane);
    const int64_t next = next_proposal(r, chunk, mine, lane, ++stamp);
    if (lane_id() == lane) {
      mine.proposal = next;
      is_turned_down = false;
    } else if (lane_id() > lane && mine.token == token && mine.is_rerouted()) {
      is_turned_down = is_turned_down || mine.proposal == next;
    }
  }
}

/// How many slots of the chunk propose to an expert: in the warps before this one, and in all.
struct Takers {
  int before;
  int total;
};

__device__ Takers count_takers(const unsigned char* of_warps) {
  constexpr int kWarpsInWord = sizeof(uint64_t);
  // Counts of up to 32 in bytes: in pairs, so that the sum of eight has room.
  const auto sum_of_bytes = [](uint64_t bytes) {
    constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff;
    const uint64_t pairs = (bytes & kEvenBytes) + ((bytes >> 8) & kEvenBytes);
    return static_cast<int>((pairs * 0x0001000100010001) >> 48);
  };
  const auto* words = reinterpret_cast<const uint64_t*>(of_warps);
  Takers takers{0, 0};
  for (int i = 0; i < kRerouteWarps / kWarpsInWord; ++i) {
    const uint64_t word = words[i];
    const int warps_before = warp_in_block() - i * kWarpsInWord;
    const uint64_t before = warps_before <= 0 ? 0
                            : warps_before >= kWarpsInWord
                                ? word
                                : word & ((uint64_t{1} << 8 * warps_before) - 1);
    takers.before += sum_of_bytes(before);
    takers.total += sum_of_bytes(word);
  }
  return takers;
}

/// Every slot of the chunk proposes until none is turned down, and gets what it has proposed to.
template <typename T>
__device__ void serve_chunk(const Rerouting<T>& r, const Chunk& chunk, int64_t& stamp) {
  Slot mine = slot_of_thread(r, chunk);
  bool is_turned_down = mine.wish >= 0 && mine.position >= r.scratch.full_from[mine.wish];
  for (;;) {
    propose(r, chunk, mine, is_turned_down, stamp);
    __syncthreads();  // threads may still read the last round's proposals
    if (mine.position >= 0) {
      chunk.rerouted_to[mine.position - chunk.begin] = mine.is_rerouted() ? mine.proposal : -1;
    }
    __syncthreads();
    is_turned_down = mine.is_rerouted() && token_has(r, chunk, mine);

    const int64_t expert = is_turned_down ? -1 : mine.proposal;
    const LaneGroup group = group_lanes(expert);
    const bool leads = expert >= 0 && group.is_led_here();
    unsigned char* of_warps = r.scratch.takers + expert * kRerouteWarps;
    if (leads) {
      of_warps[warp_in_block()] = static_cast<unsigned char>(group.size);
    }
    __syncthreads();
    const Takers takers = leads ? count_takers(of_warps) : Takers{0, 0};
    const int rank = __shfl_sync(kAllLanes, takers.before, group.leader) + group.rank;
    if (expert >= 0) {
      is_turned_down = rank >= r.scratch.room[expert];
      if (rank == r.scratch.room[expert] - 1) {
        r.scratch.full_from[expert] = mine.position + 1;
      }
    }
    const bool goes_on = block_any(is_turned_down);
    if (leads) {
      of_warps[warp_in_block()] = 0;
    }
    if (!goes_on) {
      if (leads && takers.before == 0) {
        r.scratch.room[expert] -= takers.total;
      }
      break;
    }
  }
  if (mine.position >= 0) {
    r.limited[mine.slot] = mine.proposal;
    chunk.rerouted_to[mine.position - chunk.begin] = -1;
  }
}

template <typename T>
__device__ bool has_open_expert(const Rerouting<T>& r, int64_t position) {
  bool is_open = false;
  for (int64_t e = threadIdx.x; e < r.num_experts; e += kRerouteThreads) {
    is_open = is_open || position < r.scratch.full_from[e];
  }
  return block_any(is_open);
}

template <typename T>
__global__ void __launch_bounds__(kRerouteThreads)
    reroute_kernel(Rerouting<T> r, int slots_of_warp) {
  __shared__ int64_t rerouted_to[kRerouteThreads];
  rerouted_to[threadIdx.x] = -1;
  for (int64_t e = threadIdx.x; e < r.num_experts; e += kRerouteThreads) {
    r.scratch.room[e] = r.capacity[e];
    r.scratch.full_from[e] = r.capacity[e] > 0 ? r.sizes.num_slots() : 0;
  }
  Chunk chunk{0, slots_of_warp, rerouted_to};
  int64_t stamp = 0;
  while (chunk.begin < r.sizes.num_slots() && has_open_expert(r, chunk.begin)) {
    serve_chunk(r, chunk, stamp);
    chunk.begin += static_cast<int64_t>(kRerouteWarps) * slots_of_warp;
  }
  // Where no expert has room, everything else is dropped.
  for (int64_t position = chunk.begin + threadIdx.x; position < r.sizes.num_slots();
       position += kRerouteThreads) {
    r.limited[slot_at(r, position)] = -1;
  }
}

}  // namespace

template <typename T>
void reroute_overflow(Stream stream, const Rerouting<T>& rerouting) {
  if (rerouting.sizes.num_slots() > 0) {
    launch(stream,
           1,
           kRerouteThreads,
           0,
           reroute_kernel<T>,
           rerouting,
           slots_of_warp(rerouting.sizes.top_k));
  }
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE(T, ...) template void reroute_overflow(Stream, const Rerouting<T>&);
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
#undef TORCHMOE_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda
