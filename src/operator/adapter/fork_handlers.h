// Keeps the state of this library usable in the parent and the child of a fork.
#pragma once

namespace gluon_syncbn {

// Call once, when the library is loaded.
void InstallForkHandlers();

}  // namespace gluon_syncbn
