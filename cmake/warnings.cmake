# SPDX-License-Identifier: Apache-2.0
# Warnings are errors, for our code only; sanitizers as asked.
add_compile_options(-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Wnon-virtual-dtor
                    -Wold-style-cast -Wcast-qual -Wformat=2 -Wundef -Werror)
# GCC 12 takes std::string's operator+ for an overlapping copy at -O3 (GCC bug 105651).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  add_compile_options(-Wno-restrict)
endif()
# C knows no new-style casts.
string(APPEND CMAKE_C_FLAGS " -Wno-old-style-cast")
if(TANDEM_SANITIZE)
  add_compile_options(-fsanitize=${TANDEM_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
  # GCC 12 sees uninitialized reads inside libstdc++ that only its own instrumentation makes.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options(-Wno-maybe-uninitialized)
  endif()
  # The vptr check asks the kernel through a pipe whether memory is there: in a test without free descriptors it is always wrong.
  add_compile_options(-fno-sanitize=vptr)
  add_link_options(-fsanitize=${TANDEM_SANITIZE})
endif()
