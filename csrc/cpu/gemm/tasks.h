// Tasks of whatever kinds, run in parallel.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/gemm/workspace.h"

namespace torchmoe::cpu {

/// Work for one thread, which lends it its workspace.
using Task = std::function<void(Workspace&)>;

/// Tasks that may run in any order and at the same time.
using Phase = std::vector<Task>;

/// Runs the tasks of a phase, whose products take `multiplications` in all.
void run(Phase tasks, int64_t multiplications);

/// Runs groups of phases: a group's phases follow one another, groups are independent.
///
/// A thread opens a group and works on it until it is done, so that what its phases hand on stays in
/// that thread's cache; `open(group, workspace)` gives the phases, whose tasks may keep what they
/// hand on in `workspace.group_rows` and `group_dots`. Threads that find no group to open help with those that are open.
/// Groups are opened in the order of their numbers: the largest should come first. The products of
/// all groups take `multiplications`.
void run_groups(int64_t num_groups,
                int64_t multiplications,
                const std::function<std::vector<Phase>(int64_t, Workspace&)>& open);

}  // namespace torchmoe::cpu
