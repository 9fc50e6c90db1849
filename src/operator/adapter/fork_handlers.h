// What a fork of the process means for the state that this library keeps.
#pragma once

namespace gluon_syncbn {

// Once, when the library is loaded.
void InstallForkHandlers();

}  // namespace gluon_syncbn
