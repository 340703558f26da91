# SPDX-License-Identifier: Apache-2.0
# Both builds of ./test, ./demo and a developer's own share compiled objects, if ccache is there and nobody chose otherwise.
find_program(CCACHE ccache)
mark_as_advanced(CCACHE)
foreach(language C CXX)
  if(CCACHE AND NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
    set(CMAKE_${language}_COMPILER_LAUNCHER ${CCACHE})
  endif()
endforeach()
