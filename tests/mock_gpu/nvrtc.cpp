// A libnvrtc that compiles CUDA source for this machine's CPU with g++ (see include/cuda_on_cpu.h).
// What it gives for a cubin is a shared library with a launcher for every kernel.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <regex>
#include <sstream>
#include <string>
#include <unistd.h>

struct Program { std::string source, log, cubin; };

static std::string whole_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

static std::string for_cpu(const std::string& source) {
  // Copies that were to be waited for have been made: what is left of them are these.
  static const std::regex waits("asm volatile\\(\"cp\\.async[^;]*;[^;]*;");
  static const std::regex widths("typedef [a-z ]* u?int(8|16|32|64)_t;\n");  // <cstdint> has them
  static const std::regex meets("__sync|__shfl");  // threads that meet need stacks of their own
  static const std::regex kernel(
      "extern \"C\" __global__ void (?:__launch_bounds__\\([^)]*\\) )?(\\w+)\\(([^)]*)\\) \\{");
  std::string code = std::regex_replace(source, waits, ";"), launchers;
  code = std::regex_replace(code, widths, "");
  for (std::sregex_iterator it(code.begin(), code.end(), kernel), end; it != end; ++it) {
    std::string name = (*it)[1], given;
    size_t begin = it->position() + it->length(), next = code.find("extern \"C\"", begin);
    std::string body = code.substr(begin, next - begin);
    const char* launch = std::regex_search(body, meets) ? "launch" : "launch_each";
    std::stringstream parameters((*it)[2]);
    int number = 0;
    for (std::string one; std::getline(parameters, one, ','); ++number) {
      std::string type = one.substr(0, one.find_last_of(" *&") + 1);
      given += (number ? ", *(" : "*(") + type + "*)p[" + std::to_string(number) + "]";
    }
    launchers += "extern \"C\" const int arguments_" + name + " = " + std::to_string(number) + ";\n";
    launchers += "static void call_" + name + "(void** p) { " + name + "(" + given + "); }\n";
    launchers += "extern \"C\" void launch_" + name +
                 "(const unsigned* grid, const unsigned* block, void** p) { fibers::" + launch +
                 "(call_" + name + ", grid, block, p); }\n";
  }
  return "#include \"cuda_on_cpu.h\"\n" + code + launchers;
}

extern "C" {
int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 0; return 0; }
const char* nvrtcGetErrorString(int) { return "the mock GPU refuses"; }
int nvrtcCreateProgram(Program** made, const char* source, const char*, int, const char* const*,
                       const char* const*) {
  *made = new Program{source, "", ""};
  return 0;
}
int nvrtcDestroyProgram(Program** program) { delete *program; *program = nullptr; return 0; }
int nvrtcCompileProgram(Program* program, int, const char* const*) {
  char folder[] = "/tmp/mock-gpu-XXXXXX";
  if (!mkdtemp(folder)) return 1;
  std::string at = folder;
  std::ofstream(at + "/kernel.cpp") << for_cpu(program->source);
  // The headers lie beside this source; the variable comes with its environment.
  const char* include = getenv("MOCK_GPU_INCLUDE");
  std::string command = "g++ -O1 -w -std=c++17 -mf16c -shared -fPIC -I" +
                        std::string(include ? include : ".") + " -o " + at + "/kernel.so " + at +
                        "/kernel.cpp 2> " + at + "/log";
  int code = system(command.c_str());
  program->log = whole_file(at + "/log");
  program->cubin = whole_file(at + "/kernel.so");
  system(("rm -r " + at).c_str());
  return code == 0 ? 0 : 6;
}
int nvrtcGetProgramLogSize(Program* program, size_t* size) {
  *size = program->log.size() + 1;
  return 0;
}
int nvrtcGetProgramLog(Program* program, char* log) {
  memcpy(log, program->log.c_str(), program->log.size() + 1);
  return 0;
}
int nvrtcGetCUBINSize(Program* program, size_t* size) { *size = program->cubin.size(); return 0; }
int nvrtcGetCUBIN(Program* program, char* cubin) {
  memcpy(cubin, program->cubin.data(), program->cubin.size());
  return 0;
}
}
