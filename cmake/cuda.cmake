# The module for CUDA devices, _cuda, and its emulated twin for tests, _cuda_emulated.
#
# nvcc is called by rules of our own. CMake's CUDA language wants a whole toolkit laid out as NVIDIA's
# installers do it; the compiler from Python wheels is laid out otherwise, and needs no more than this.
set(MLA_CUDA "" CACHE STRING "auto, on or off; empty: the environment's MLA_CUDA, else auto")
set(MLA_CUDA_ARCHS "" CACHE STRING
    "90a-real;80-virtual;..., or all; empty: the environment's MLA_CUDA_ARCHS, else the GPUs here")
option(MLA_CUDA_TESTS "Build the programs of tests/cuda, for a device or emulated" OFF)
option(MLA_CUDA_EMULATE "Build _cuda_emulated, which runs the kernels on the CPU, for tests" OFF)

file(GLOB_RECURSE MLA_CUDA_KERNELS CONFIGURE_DEPENDS csrc/backends/cuda/*.cu)
file(GLOB_RECURSE MLA_CUDA_SOURCES CONFIGURE_DEPENDS csrc/backends/cuda/*.cpp)
file(GLOB MLA_CUDA_BINDINGS CONFIGURE_DEPENDS csrc/bindings/cuda/*.cpp
     csrc/bindings/register_errors.cpp)
file(GLOB MLA_CUDA_TEST_SOURCES CONFIGURE_DEPENDS tests/cuda/test_*.cu)

# ---- what is there ------------------------------------------------------------------------------
# Wheels put the compiler and the headers beside each other into site-packages/nvidia/cu<version>.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import glob, sys; print(*(p for s in sys.path for p in glob.glob(s + '/nvidia/cu[0-9]*')), sep=';')"
  OUTPUT_VARIABLE MLA_CUDA_WHEELS OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
list(TRANSFORM MLA_CUDA_WHEELS APPEND /bin OUTPUT_VARIABLE MLA_CUDA_WHEEL_BINS)
list(TRANSFORM MLA_CUDA_WHEELS APPEND /include OUTPUT_VARIABLE MLA_CUDA_WHEEL_INCLUDES)

# Not kept from one configuration to the next: wheels of an isolated build are gone after it.
unset(MLA_NVCC CACHE)
find_program(MLA_NVCC NAMES $ENV{CUDACXX} ${CMAKE_CUDA_COMPILER} nvcc
             HINTS ${MLA_CUDA_WHEEL_BINS} PATHS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
mark_as_advanced(MLA_NVCC)

# Sets <out> to the toolkit's directory: a script on the PATH may stand for the compiler, so that it
# is asked where it is.
function(mla_toolkit_of nvcc out)
  execute_process(COMMAND ${nvcc} --dryrun -c -x cu -o /dev/null /dev/null ERROR_VARIABLE plan OUTPUT_QUIET)
  if(plan MATCHES "_HERE_=([^\n]*)")
    string(STRIP "${CMAKE_MATCH_1}" here)
    get_filename_component(top "${here}/.." REALPATH)
    set(${out} ${top} PARENT_SCOPE)
  endif()
endfunction()

# ---- what to build ------------------------------------------------------------------------------
# The first that is not empty, in lower case.
function(mla_first_of out)
  foreach(value IN LISTS ARGN)
    if(NOT "${value}" STREQUAL "")
      string(TOLOWER "${value}" value)
      set(${out} "${value}" PARENT_SCOPE)
      break()
    endif()
  endforeach()
endfunction()

mla_first_of(mla_cuda "${MLA_CUDA}" "$ENV{MLA_CUDA}" auto)
if(NOT mla_cuda MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "MLA_CUDA is ${mla_cuda}; auto, on and off are accepted")
endif()

set(mla_cuda_why "")
if(mla_cuda STREQUAL off)
  set(mla_cuda_why "MLA_CUDA is off")
elseif(NOT MLA_NVCC)
  set(mla_cuda_why "nvcc was found neither on the PATH, nor as CUDACXX, in /usr/local/cuda or among the Python packages")
elseif(CMAKE_CROSSCOMPILING)
  set(mla_cuda_why "this build is for another machine")
elseif(MLA_SANITIZE)
  set(mla_cuda_why "this build is instrumented")
else()
  mla_toolkit_of(${MLA_NVCC} MLA_CUDA_TOOLKIT)
  unset(MLA_CUDART CACHE)
  find_library(MLA_CUDART cudart_static NO_DEFAULT_PATH
               PATHS ${MLA_CUDA_TOOLKIT} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib
               targets/sbsa-linux/lib)
  mark_as_advanced(MLA_CUDART)
  if(NOT MLA_CUDART)
    set(mla_cuda_why "${MLA_NVCC} comes without libcudart_static.a")
  endif()
endif()

if("${mla_cuda_why}" STREQUAL "")
  set(MLA_CUDA_BUILD ON)
elseif(mla_cuda STREQUAL on)
  message(FATAL_ERROR "CUDA: MLA_CUDA is on, but ${mla_cuda_why}")
else()
  set(MLA_CUDA_BUILD OFF)
  message(STATUS "CUDA: not built, because ${mla_cuda_why}")
endif()

# ---- architectures ------------------------------------------------------------------------------
# Sets <out> to the architectures of the GPUs here, or to the one that the kernels are tuned for.
function(mla_present_archs out)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  RESULT_VARIABLE failed OUTPUT_VARIABLE present ERROR_QUIET)
  set(archs "")
  if(failed EQUAL 0)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" present "${present}")
    foreach(capability IN LISTS present)
      string(REPLACE "." "" arch ${capability})
      # From 9.0 on, what is best about an architecture is not carried over to the next.
      if(arch GREATER_EQUAL 90 AND arch LESS 120)
        string(APPEND arch a)
      endif()
      list(APPEND archs ${arch}-real)
    endforeach()
    list(REMOVE_DUPLICATES archs)
  endif()
  if("${archs}" STREQUAL "")
    set(archs 90a-real)
  endif()
  set(${out} ${archs} PARENT_SCOPE)
endfunction()

set(mla_archs "${MLA_CUDA_ARCHS}")
if("${mla_archs}" STREQUAL "")
  set(mla_archs "$ENV{MLA_CUDA_ARCHS}")
endif()
if("${mla_archs}" STREQUAL "" AND MLA_CUDA_BUILD)
  mla_present_archs(mla_archs)
elseif("${mla_archs}" STREQUAL all)
  set(mla_archs 75-real 80-real 86-real 89-real 90a-real 120-real 80-virtual)
endif()

# ---- _cuda --------------------------------------------------------------------------------------
# Adds a rule that compiles one file, and its object to <out>.
function(mla_compile_cuda source out)
  file(RELATIVE_PATH name ${CMAKE_CURRENT_SOURCE_DIR} ${source})
  set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o)
  get_filename_component(folder ${object} DIRECTORY)
  file(MAKE_DIRECTORY ${folder})
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${CMAKE_CXX_COMPILER_LAUNCHER} ${MLA_NVCC} -ccbin ${CMAKE_CXX_COMPILER} ${MLA_NVCC_FLAGS}
            -I${CMAKE_CURRENT_SOURCE_DIR}/csrc -I${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda
            -MD -MT ${object} -MF ${object}.d -c ${source} -o ${object}
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "Compiling ${name}"
    VERBATIM)
  set(${out} ${${out}} ${object} PARENT_SCOPE)
endfunction()

if(MLA_CUDA_BUILD)
  set(MLA_NVCC_FLAGS -std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden,-Wall)
  foreach(arch IN LISTS mla_archs)
    string(REGEX REPLACE "-(real|virtual)$" "" number ${arch})
    if(NOT arch MATCHES "-virtual$")
      list(APPEND MLA_NVCC_FLAGS -gencode=arch=compute_${number},code=sm_${number})
    endif()
    if(NOT arch MATCHES "-real$")
      list(APPEND MLA_NVCC_FLAGS -gencode=arch=compute_${number},code=compute_${number})
    endif()
  endforeach()
  # Code for many architectures is mostly the same twice; a single one loads faster as it is.
  list(LENGTH mla_archs mla_n_archs)
  execute_process(COMMAND ${MLA_NVCC} --help OUTPUT_VARIABLE mla_nvcc_help ERROR_QUIET)
  if(mla_n_archs GREATER 1 AND mla_nvcc_help MATCHES "--compress-mode")
    list(APPEND MLA_NVCC_FLAGS --compress-mode=size)
  endif()
  set(objects "")
  foreach(source IN LISTS MLA_CUDA_KERNELS)
    mla_compile_cuda(${source} objects)
  endforeach()
  # A target of their own, or the slowest files would wait for mla_core.
  add_custom_target(mla_cuda_objects DEPENDS ${objects})
  add_library(mla_cuda STATIC ${MLA_CUDA_SOURCES} ${objects})
  add_dependencies(mla_cuda mla_cuda_objects)
  target_include_directories(mla_cuda SYSTEM PUBLIC ${MLA_CUDA_TOOLKIT}/include)
  target_link_libraries(mla_cuda PUBLIC mla_core ${MLA_CUDART} ${CMAKE_DL_LIBS} rt)
  pybind11_add_module(_cuda MODULE NO_EXTRAS ${MLA_CUDA_BINDINGS})
  string(REPLACE ";" "," archs_text "${mla_archs}")
  target_compile_definitions(_cuda PRIVATE MLA_CUDA_MODULE=_cuda MLA_CUDA_ARCHS="${archs_text}")
  target_link_libraries(_cuda PRIVATE mla_cuda)
  target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
  install(TARGETS _cuda LIBRARY DESTINATION mla_backend)
  if(MLA_CUDA_TESTS)
    foreach(source IN LISTS MLA_CUDA_TEST_SOURCES)
      get_filename_component(name ${source} NAME_WE)
      set(object "")
      mla_compile_cuda(${source} object)
      add_executable(cuda_${name} ${object})
      set_target_properties(cuda_${name} PROPERTIES LINKER_LANGUAGE CXX)
      target_link_libraries(cuda_${name} PRIVATE mla_cuda)
    endforeach()
  endif()
  string(REPLACE ";" ", " shown "${mla_archs}")
  message(STATUS "CUDA: built by ${MLA_NVCC} for ${shown}")
endif()

# ---- _cuda_emulated -----------------------------------------------------------------------------
if(MLA_CUDA_EMULATE)
  if(MLA_NVCC)
    mla_toolkit_of(${MLA_NVCC} MLA_CUDA_TOOLKIT)
  endif()
  unset(MLA_CUDA_HEADERS CACHE)
  find_path(MLA_CUDA_HEADERS cuda_fp16.h HINTS ${MLA_CUDA_TOOLKIT}/include ${MLA_CUDA_WHEEL_INCLUDES}
            /usr/local/cuda/include)
  mark_as_advanced(MLA_CUDA_HEADERS)
  if(NOT MLA_CUDA_HEADERS)
    message(FATAL_ERROR "MLA_CUDA_EMULATE is on, but cuda_fp16.h was not found")
  endif()
  file(GLOB MLA_EMULATOR CONFIGURE_DEPENDS tests/cuda/emulator/*.cpp)
  # The emulator has a runtime of its own.
  set(sources ${MLA_CUDA_SOURCES})
  list(FILTER sources EXCLUDE REGEX "/backends/cuda/runtime\\.cpp$")

  # Fused products and conversions of halves are slow where they are not instructions.
  set(flags -O2 -fno-strict-aliasing -Wno-unknown-pragmas -Wno-unused-function)
  include(CheckCXXSourceRuns)
  check_cxx_source_runs("int main() { return __builtin_cpu_supports(\"avx2\") && __builtin_cpu_supports(\"fma\") ? 0 : 1; }"
                        MLA_HOST_HAS_FMA)
  if(MLA_HOST_HAS_FMA)
    list(APPEND flags -mavx2 -mfma -mf16c)
  endif()

  add_library(mla_cuda_emulated STATIC ${MLA_CUDA_KERNELS} ${sources} ${MLA_EMULATOR})
  set_source_files_properties(${MLA_CUDA_KERNELS} ${MLA_CUDA_TEST_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
  target_compile_definitions(mla_cuda_emulated PUBLIC MLA_CUDA_EMULATE)
  target_compile_options(mla_cuda_emulated PRIVATE ${flags} -Wno-pedantic)
  target_include_directories(mla_cuda_emulated PUBLIC tests/cuda)
  target_include_directories(mla_cuda_emulated SYSTEM PUBLIC ${MLA_CUDA_HEADERS})
  target_link_libraries(mla_cuda_emulated PUBLIC mla_core)

  pybind11_add_module(_cuda_emulated MODULE NO_EXTRAS ${MLA_CUDA_BINDINGS})
  # As code that any device can be given.
  target_compile_definitions(_cuda_emulated PRIVATE MLA_CUDA_MODULE=_cuda_emulated
                             MLA_CUDA_ARCHS="75-virtual")
  target_link_libraries(_cuda_emulated PRIVATE mla_cuda_emulated)
  if(MLA_CUDA_TESTS)
    foreach(source IN LISTS MLA_CUDA_TEST_SOURCES)
      get_filename_component(name ${source} NAME_WE)
      add_executable(emulated_${name} ${source})
      target_compile_options(emulated_${name} PRIVATE ${flags} -Wno-pedantic)
      target_link_libraries(emulated_${name} PRIVATE mla_cuda_emulated)
    endforeach()
  endif()
  message(STATUS "CUDA: emulated, with the headers of ${MLA_CUDA_HEADERS}")
endif()
