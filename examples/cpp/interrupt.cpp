#include "interrupt.h"

#include <csignal>

namespace {

volatile std::sig_atomic_t interrupted = 0;

void on_interrupt(int) {
  interrupted = 1;
}

}  // namespace

void catch_interrupt() {
  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  // After the first signal the default is back. A write that it meets goes on.
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  struct sigaction before = {};
  sigaction(SIGINT, &action, &before);
  if (before.sa_handler == SIG_IGN) {  // as in a script's background: it stays so
    sigaction(SIGINT, &before, nullptr);
  }
}

bool was_interrupted() {
  return interrupted != 0;
}
