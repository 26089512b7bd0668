# vLLM's own image and this package. Not built where it was written: see docker/README.md.
FROM vllm/vllm-openai:v0.33.0
COPY . /src/msa-backend
# Its only requirement is the engine, which is there.
RUN python3 -m pip install --no-cache-dir --no-deps /src/msa-backend && rm -rf /src/msa-backend
ENTRYPOINT ["vllm", "serve"]
CMD ["--help"]
