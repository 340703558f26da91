# SPDX-License-Identifier: Apache-2.0
# tandem_bpf_skeleton(TARGET SOURCE): compiles a BPF program with clang (CO-RE, against this kernel's BTF for type
# definitions only) and makes an INTERFACE library whose include folder holds NAME.skel.h.
find_program(BPF_CLANG NAMES clang clang-14 clang-16 REQUIRED)
find_program(BPFTOOL NAMES bpftool PATHS /usr/sbin REQUIRED)

function(tandem_bpf_skeleton target source)
  get_filename_component(name ${source} NAME_WE)
  get_filename_component(path ${source} ABSOLUTE)
  set(out ${CMAKE_CURRENT_BINARY_DIR}/bpf)
  file(MAKE_DIRECTORY ${out})
  set(machine ${CMAKE_SYSTEM_PROCESSOR})
  if(machine STREQUAL "x86_64")
    set(arch x86)
  elseif(machine STREQUAL "aarch64")
    set(arch arm64)
  endif()
  add_custom_command(
    OUTPUT ${out}/${name}.skel.h
    COMMAND ${BPF_CLANG} -g -O2 -target bpf -mcpu=v3 -D__TARGET_ARCH_${arch} -Wall -Werror
            -I${PROJECT_SOURCE_DIR} -I/usr/include/${machine}-linux-gnu -c ${path} -o ${out}/${name}.bpf.o
    COMMAND ${BPFTOOL} gen skeleton ${out}/${name}.bpf.o name ${name}_bpf > ${out}/${name}.skel.h
    DEPENDS ${path} ${PROJECT_SOURCE_DIR}/common/layout/fence_slot.h
    VERBATIM)
  add_custom_target(${target}_generate DEPENDS ${out}/${name}.skel.h)
  add_library(${target} INTERFACE)
  add_dependencies(${target} ${target}_generate)
  # SYSTEM: bpftool's output is not held to our warnings.
  target_include_directories(${target} SYSTEM INTERFACE ${out})
  target_link_libraries(${target} INTERFACE PkgConfig::LIBBPF)
endfunction()
