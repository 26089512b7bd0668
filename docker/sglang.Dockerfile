# SGLang's own image and this package. Not built where it was written: see docker/README.md.
FROM lmsysorg/sglang:v0.5.23
COPY . /src/msa-backend
# Its only requirement is the engine, which is there.
RUN python3 -m pip install --no-cache-dir --no-deps /src/msa-backend && rm -rf /src/msa-backend
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0"]
CMD ["--help"]
