/* The public header compiled as C99, and the library used from C: what an embedder does first. */
#include <sparkv/gpu.h>
#include <sparkv/sparkv.h>
#include <stdio.h>
#include <string.h>

static int failures = 0;

static void expect(int holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "expected: %s\n", what);
  failures++;
}

int main(void) {
  sparkv_config config;
  sparkv_error error = {""};
  uint16_t key[64], back[64];
  uint8_t row[512];
  size_t row_size;
  int i;

  expect(strcmp(sparkv_version(), SPARKV_VERSION) == 0, "header and library are of one version");

  memset(&config, 0, sizeof config);
  config.struct_size = sizeof config;
  expect(sparkv_config_preset(&config, NULL, &error) == SPARKV_OK, "NULL is the default preset");
  expect(strcmp(config.preset, "balanced") == 0, "the default preset is balanced");
  expect(sparkv_config_set(&config, "ratio", "2", &error) == SPARKV_INVALID, "ratio 2 is refused");
  expect(strstr(error.text, "ratio") != NULL && strchr(error.text, '2') != NULL,
         "the error names field and value");
  expect(config.ratio == 0.0, "a refused value changes nothing");
  expect(sparkv_config_preset(&config, "no-such", NULL) == SPARKV_INVALID, "error may be NULL");

  expect(sparkv_config_preset(&config, "exact", &error) == SPARKV_OK, "the preset 'exact' exists");
  for (i = 0; i < 64; i++) key[i] = (uint16_t)(0x3c00 + i);
  row_size = sparkv_key_row_bytes(&config, 64);
  expect(row_size > 0 && row_size <= sizeof row, "an exact row of 64 channels fits 512 bytes");
  expect(sparkv_pack_key(&config, NULL, key, 64, row, row_size, &error) == SPARKV_OK, "packing");
  expect(sparkv_unpack_key(&config, NULL, row, row_size, 64, back, &error) == SPARKV_OK, "back");
  expect(memcmp(key, back, sizeof key) == 0, "'exact' gives the same bits back");

  if (failures) fprintf(stderr, "last error: %s\n", error.text);
  return failures != 0;
}
