// Ctrl-C: the first asks the program to stop, a second one kills it.
#pragma once

/// From here on the first SIGINT only sets a flag.
void catch_interrupt();

/// Whether a SIGINT has come since.
bool was_interrupted();
